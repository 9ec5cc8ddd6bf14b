"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHAT = "Checkpoint directory or GGUF file."

Model = Annotated[Path, typer.Argument(help=_WHAT, show_default=False)]
OptionalModel = Annotated[
    Path | None, typer.Argument(help=f"{_WHAT} Default: the embedded model.", show_default=False)
]
