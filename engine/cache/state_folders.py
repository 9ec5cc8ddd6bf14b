"""The folders of saved states: one for each model, named by what its states depend on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.cache.state_files import ENDING
from memory.user_files import user_cache

MODEL = "model"  # a file with the model's name, in its folder
ABANDONED_S = 3600  # after which a file that is not finished will not be


def states_folder() -> Path:
    """Where states are unless told otherwise."""
    return user_cache() / "states"


@dataclass(frozen=True)
class ModelStates:
    """What a folder holds of a model.

    model      its name; folders of other files or back ends than today's may have the same
    used       when the last of them was, in seconds
    """

    folder: Path
    model: str
    states: int
    nbytes: int
    used: float


def states_in(root: Path) -> list[ModelStates]:
    """The models that have states in a folder, the last used first."""
    found: dict[Path, list[tuple[float, int]]] = {}
    for path, used, nbytes in state_files(root):
        found.setdefault(path.parent, []).append((used, nbytes))
    models = []
    for folder, states in found.items():
        name = folder / MODEL
        models.append(
            ModelStates(
                folder,
                name.read_text() if name.exists() else folder.name,
                len(states),
                sum(nbytes for _, nbytes in states),
                max(used for used, _ in states),
            )
        )
    return sorted(models, key=lambda of: -of.used)


def remove_states(of: ModelStates) -> None:
    """Remove all states of a model. Raises OSError."""
    for path in of.folder.glob(f"*{ENDING}"):
        path.unlink(missing_ok=True)
    remove_abandoned(of.folder)
    (of.folder / MODEL).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's files
        of.folder.rmdir()


def remove_abandoned(folder: Path) -> None:
    """Remove what servers of a model began to write long ago, and did not finish."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - ABANDONED_S:
                path.unlink()


def state_files(root: Path) -> Iterator[tuple[Path, float, int]]:
    """All states in a folder, of any model: when they were used last, and their bytes."""
    for path in root.glob(f"*/*{ENDING}"):
        with suppress(OSError):
            found = path.stat()
            yield path, found.st_mtime, found.st_size
