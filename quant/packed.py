"""PackedTensor: packed codes with their scales, and what is needed to turn them into numbers.

It knows nothing of where its bytes lie: `codes` and `scales` may be views of a mapped file, of a
slot in an arena or ordinary tensors, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quant.errors import FormatError

if TYPE_CHECKING:
    from quant.formats import Format


@dataclass(frozen=True)
class PackedTensor:
    """A logical `[rows, cols]` float matrix stored in a `Format`.

    `codes` holds the packed values and `scales` what the format needs beside them (None where the
    scales are interleaved with the codes, as in GGUF blocks). Their exact shapes and bit order are
    documented with each format. Raises FormatError where shapes or dtypes contradict the format;
    what the bytes say is looked at by `validate` alone.
    """

    format: Format
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.format.check(self)

    @property
    def nbytes(self) -> int:
        """Bytes held by codes and scales together."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.codes.nbytes + scales

    def rows(self, start: int, stop: int) -> PackedTensor:
        """A view of rows `start..stop`; both must lie on the format's tile borders."""
        if start % self.format.tile_rows or (stop % self.format.tile_rows and stop != self.shape[0]):
            raise FormatError(
                f"{self.format.name}: rows {start}..{stop} cut a tile of {self.format.tile_rows} rows"
            )
        return self.format.slice_rows(self, start, stop)

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole matrix as numbers, `[rows, cols]` of `dtype`."""
        return self.format.decode(self).to(dtype)

    def validate(self) -> None:
        """Read every byte; raise FormatError where a scale or a value is NaN or infinite."""
        self.format.validate(self)
