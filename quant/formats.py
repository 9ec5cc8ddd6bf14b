"""The interface every packed format implements, and the look-up by name.

A format is stateless: it checks, decodes and slices PackedTensors, and encodes float matrices into
them. Bits are documented in the module of each format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from quant.errors import FormatError
from quant.packed import PackedTensor


class Format(ABC):
    """How a `[rows, cols]` float matrix is laid out in bits.

    name:       as configs and reports call it
    tile_rows:  rows that share a scale, so the smallest step a row slice may take
    tile_cols:  columns that share a scale, so `cols` must be a multiple of it
    """

    name: str
    tile_rows: int = 1
    tile_cols: int = 32

    @abstractmethod
    def check(self, packed: PackedTensor) -> None:
        """Raise FormatError where shapes or dtypes of `packed` contradict the format."""

    @abstractmethod
    def decode(self, packed: PackedTensor) -> torch.Tensor:
        """All values, `[rows, cols]` float32."""

    @abstractmethod
    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        """A view of whole tiles of rows."""

    def bytes_for(self, rows: int, cols: int) -> int:
        """Bytes of codes and scales of a `[rows, cols]` matrix."""
        raise NotImplementedError

    def expect(self, what: str, found: object, expected: object) -> None:
        """Raise FormatError where `found` differs from `expected`."""
        if found != expected:
            raise FormatError(f"{self.name}: {what} is {found}, expected {expected}")
