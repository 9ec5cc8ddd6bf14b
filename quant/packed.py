"""PackedTensor: packed codes with their scales; Format: how they are decoded and encoded.

A packed tensor does not know where its bytes are: `codes` and `scales` may be views of a slot in an
arena or ordinary tensors, on any device. A format is stateless: it encodes float matrices into packed
tensors, checks, decodes and slices them. Bits are documented in the module of each format
(`quant/formats/`), and side by side in docs/formats.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from quant.errors import FormatError

Part = tuple[tuple[int, ...], torch.dtype]

# Largest block decoded by `validate`: 1 Mi float32 values are 4 MiB.
VALIDATED_VALUES = 1 << 20


@dataclass(frozen=True)
class PackedTensor:
    """A logical `[rows, cols]` float matrix stored in a `Format`.

    `codes` holds the packed values and `scales` what the format needs beside them (None where the
    scales are interleaved with the codes, as in GGUF blocks). Their exact shapes and bit order are
    documented with each format. Raises FormatError where shapes or dtypes contradict the format;
    only `validate` looks at the bytes.
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
                f"{self.format.name}: rows {start}..{stop} cut through a tile of {self.format.tile_rows} rows"
            )
        return self.format.slice_rows(self, start, stop)

    def reordered(self, order: torch.Tensor) -> PackedTensor:
        """The rows of these numbers, `[rows]`, in this order; those of a tile must come from one tile."""
        tile, scales = self.format.tile_rows, self.scales
        tiles = order // tile
        sources = tiles[::tile]  # of each tile
        if not torch.equal(tiles, sources.repeat_interleave(tile)[: len(order)]):
            raise FormatError(f"{self.format.name}: rows that share a scale with others cannot be reordered")
        scales = None if scales is None else scales[sources]
        return PackedTensor(self.format, (len(order), self.shape[1]), self.codes[order], scales)

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole matrix decoded, `[rows, cols]` of `dtype`."""
        return self.format.decode(self).to(dtype)

    def validate(self) -> None:
        """Read every byte; raise FormatError where a scale or a value is NaN or infinite."""
        self.format.validate(self)


class Format(ABC):
    """How a `[rows, cols]` float matrix is laid out in bits.

    name:       as in configs and reports
    tile_rows:  rows that share a scale, so the smallest step a row slice may take
    tile_cols:  columns that share a scale
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

    @abstractmethod
    def bytes_for(self, rows: int, cols: int) -> int:
        """Bytes of codes and scales of a `[rows, cols]` matrix."""

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """Shape and dtype of a matrix's codes, and of its scales where these are apart."""
        return (((rows, self.bytes_for(1, cols)), torch.uint8),)

    def encode(self, values: torch.Tensor, scales: torch.Tensor | None = None) -> PackedTensor:
        """`values` `[rows, cols]`, any float dtype, with each code the nearest to its value.

        scales: what to use as `PackedTensor.scales`; None takes the smallest that clip nothing.
        Raises FormatError for NaN or infinite values, for a shape that the format cannot hold, and
        for a format that is only read.
        """
        raise FormatError(
            f"{self.name}: this format can be read but not written; choose mxfp4, nf4, int4 or fp8"
        )

    def validate(self, packed: PackedTensor) -> None:
        """Raise FormatError where a scale or a value is NaN or infinite. Reads every byte of `packed`."""
        step = max(self.tile_rows, VALIDATED_VALUES // packed.shape[1] // self.tile_rows * self.tile_rows)
        for start in range(0, packed.shape[0], step):
            stop = min(start + step, packed.shape[0])
            if not bool(self.slice_rows(packed, start, stop).decode().isfinite().all()):
                raise FormatError(
                    f"{self.name}: rows {start}..{stop} decode to NaN or infinite values; "
                    "the file is damaged, download or convert it again"
                )

    def expect(self, what: str, found: object, expected: object) -> None:
        """Raise FormatError where `found` differs from `expected`."""
        if found != expected:
            raise FormatError(f"{self.name}: {what} is {found}, expected {expected}")

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as a finite float32 matrix; raises FormatError where it isn't one."""
        if values.ndim != 2 or 0 in values.shape:
            raise FormatError(f"{self.name}: encodes matrices [rows, cols], found shape {list(values.shape)}")
        if not values.is_floating_point():
            raise FormatError(f"{self.name}: encodes floats, found {values.dtype}; decode the tensor first")
        values = values.to(torch.float32)
        if not bool(values.isfinite().all()):
            raise FormatError(f"{self.name}: the matrix to encode has NaN or infinite values; fix it first")
        return values
