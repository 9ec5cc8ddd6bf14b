"""Arguments that several commands share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from engine.embedded import EMBEDDED, model_path
from quant.errors import ConfigError, LociError
from quant.formats.kv_names import KvChoice
from server.settings import Experts

_NAMES = ", ".join(EMBEDDED)
_WHAT = (
    "Checkpoint directory, GGUF file, ORG/MODEL of the Hugging Face Hub, or an embedded model's name "
    f"({_NAMES})."
)
METAVAR = "MODEL"


def _known(incomplete: str) -> Iterator[str]:
    """Directories and GGUF files where `incomplete` points, embedded models, and those in the Hub's cache."""
    folder = incomplete.rpartition("/")[0]
    for path in sorted(Path(folder or ".").glob("*")):
        if path.is_dir() or path.suffix.lower() == ".gguf":
            yield f"{folder}/{path.name}" if folder or incomplete.startswith("/") else path.name
    yield from EMBEDDED
    from memory.hub.cache import cached_models

    try:
        yield from (found.name for found in cached_models())
    except (LociError, OSError):
        return


def complete_model(incomplete: str) -> list[str]:
    """What a shell offers for the beginning of a model's name."""
    return [found for found in _known(incomplete) if found.startswith(incomplete)]


# A model that is on this machine, as its path. A name of the Hub is one where the cache has it.
Model = Annotated[
    Path,
    typer.Argument(
        help=_WHAT, parser=model_path, metavar=METAVAR, autocompletion=complete_model, show_default=False
    ),
]


def _or_default(path: Path | None) -> Path:
    return path or model_path(None)


OptionalModel = Annotated[
    Path | None,
    typer.Argument(
        help=f"{_WHAT} Default: demo.",
        parser=model_path,
        callback=_or_default,
        metavar=METAVAR,
        autocompletion=complete_model,
        show_default=False,
    ),
]
# A model as the user names it, which may have to be fetched.
NamedModel = Annotated[
    str, typer.Argument(help=_WHAT, metavar=METAVAR, autocompletion=complete_model, show_default=False)
]
OptionalNamedModel = Annotated[
    str | None,
    typer.Argument(
        help=f"{_WHAT} Default: demo.",
        metavar=METAVAR,
        autocompletion=complete_model,
        show_default=False,
    ),
]
HubName = Annotated[
    str,
    typer.Argument(
        help="ORG/MODEL of the Hugging Face Hub. ORG/MODEL@REVISION is another branch, tag or commit, "
        "ORG/MODEL:Q4_K_M one of several GGUF files, by quantization or name.",
        metavar="ORG/MODEL",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Download without asking, however large it is.")]


def can_be_written(path: Path | None) -> Path | None:
    """`path`, refused now, rather than after the work, where no file can be written there."""
    if path is None:
        return None
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a regular file; name another file")
    if above != path.absolute() and not above.is_dir():
        raise ConfigError(f"{path}: {above} is not a directory")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{path}: no write permission; choose another path")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Also write the results to this file.", callback=can_be_written, show_default=False
    ),
]
KvFormatOption = Annotated[
    KvChoice,
    typer.Option(
        "--kv-format",
        help="Format of the KV cache: float32, bf16, fp8, int8, or vendor, what the model's makers keep.",
    ),
]
ExpertsFormat = Annotated[
    Experts | None,
    typer.Option(
        "--experts",
        help="Format for routed experts that are stored in BF16, F16, F32 or FP8. Default: as stored.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="LOCI_API_KEY", help="API key, if the server requires one.", show_default=False),
]
Devices = Annotated[
    str | None, typer.Option(help="GPUs for the weights, e.g. cuda:22GiB. Default: none.", show_default=False)
]
DramBudget = Annotated[
    str | None,
    typer.Option(
        help="Memory for weights, e.g. 16GiB. Default: three quarters of free memory.",
        show_default=False,
    ),
]
