"""Tensors of a checkpoint: the location of each, and what a family expects of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorEntry:
    """The location of a tensor: dtype as the file names it, logical shape, byte range in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorSpec:
    """What a family expects of one tensor: shape, and the dtypes it can read."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
