"""Tensors of a checkpoint: the location of each, and what a family expects of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class TensorEntry:
    """The location of a tensor: dtype as the file names it, logical shape, byte range in `file`.

    Parts of the first dimension are byte ranges as well: `of(e)` is expert e of a fused tensor
    `[experts, rows, cols]`, `rows(a, b)` are rows a to b of a matrix.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def of(self, index: int) -> TensorEntry:
        """Number `index` of the first dimension, which the result does not have any more."""
        part = self.rows(index, index + 1)
        return replace(part, shape=self.shape[1:])

    def rows(self, start: int, stop: int) -> TensorEntry:
        """Numbers `start` up to `stop` of the first dimension."""
        if not 0 <= start < stop <= self.shape[0]:
            raise IndexError(f"{self.name} {list(self.shape)} has no rows {start}..{stop}")
        each = self.nbytes // self.shape[0]
        return replace(
            self,
            name=f"{self.name}[{start}:{stop}]",
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * each,
            nbytes=(stop - start) * each,
        )


@dataclass(frozen=True)
class TensorSpec:
    """What a family expects of one tensor: shape, and the dtypes it can read."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
