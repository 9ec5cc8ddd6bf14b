"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.embedded import EMBEDDED, model_path

_NAMES = ", ".join(EMBEDDED)
_WHAT = f"Checkpoint directory, GGUF file, or an embedded model's name ({_NAMES})."

Model = Annotated[Path, typer.Argument(help=_WHAT, callback=model_path, show_default=False)]
OptionalModel = Annotated[
    Path | None,
    typer.Argument(help=f"{_WHAT} Default: demo.", callback=model_path, show_default=False),
]
