"""Arguments that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from engine.embedded import EMBEDDED, model_path
from quant.errors import ConfigError

_NAMES = ", ".join(EMBEDDED)
_WHAT = f"Checkpoint directory, GGUF file, or an embedded model's name ({_NAMES})."

Model = Annotated[Path, typer.Argument(help=_WHAT, callback=model_path, show_default=False)]
OptionalModel = Annotated[
    Path | None,
    typer.Argument(help=f"{_WHAT} Default: demo.", callback=model_path, show_default=False),
]


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
