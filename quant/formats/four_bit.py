"""What the four-bit formats share: two codes in a byte, a table of 16 levels, a scale per block of columns.

value = levels[code] * scale        (INT4 with an offset adds it)

A block is `block` consecutive columns of one row. A format says what its levels are, which nibble
holds the even column, and how its scales are stored.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from quant.errors import FormatError
from quant.packed import Format, PackedTensor, Part

TINY = torch.finfo(torch.float32).tiny


class FourBit(Format):
    """Codes uint8 `[rows, cols/2]`; scales `[rows, cols/block, *scale_fields]` of `scale_dtype`."""

    scale_fields: tuple[int, ...] = ()
    # What a search multiplies the covering scales by; finer steps than these are left to least squares.
    search_factors: tuple[float, ...] = (0.66, 0.72, 0.78, 0.84, 0.9, 0.96)

    def __init__(
        self, name: str, block: int, levels: torch.Tensor, scale_dtype: torch.dtype, *, even_is_low: bool
    ) -> None:
        self.name = name
        self.tile_cols = block
        self.levels = levels  # [16] float32, the value of each code at scale 1
        self.scale_dtype = scale_dtype
        self.even_is_low = even_is_low
        byte = torch.arange(256)
        even, odd = (byte & 15, byte >> 4) if even_is_low else (byte >> 4, byte & 15)
        # Both values of each byte, as one 64-bit number: a byte is decoded by one lookup.
        self._pairs = torch.stack((levels[even], levels[odd]), dim=1).view(torch.int64).flatten()  # [256]

    @abstractmethod
    def covering_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """The smallest scales that clip nothing, as stored; blocks `[rows, cols/block, block]` float32."""

    @abstractmethod
    def store(self, scales: torch.Tensor) -> torch.Tensor:
        """float32 scales as the nearest that the format can store."""

    @abstractmethod
    def scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        """Stored scales (without offsets) as float32, `[rows, cols/block]`."""

    @abstractmethod
    def nearest_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        """The level nearest to each float32 value; values beyond the ends get the end."""

    @abstractmethod
    def codes_of(self, levels: torch.Tensor) -> torch.Tensor:
        """The codes of what `nearest_levels` returned, uint8."""

    def nearby_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        """As `nearest_levels`, where it is faster a hair less exact: good enough to compare scales."""
        return self.nearest_levels(scaled)

    def rescaled(self, stored: torch.Tensor, factor: float) -> torch.Tensor:
        """Stored scales times `factor`; an offset moves along, so that the middle of a block stays."""
        return self.store(self.scale_values(stored) * factor)

    def fitted(self, blocks: torch.Tensor, levels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The stored scales with the least weighted square error, if these levels are kept.

        blocks, levels `[rows, cols/block, block]`; weights broadcast to them.
        """
        weighted = levels * weights
        return self.store((weighted * blocks).sum(-1) / (weighted * levels).sum(-1).clamp(min=TINY))

    def check(self, packed: PackedTensor) -> None:
        rows, cols = packed.shape
        self.expect_whole_blocks(cols)
        if packed.scales is None:
            raise FormatError(f"{self.name}: scales are missing")
        self.expect("codes shape", tuple(packed.codes.shape), (rows, cols // 2))
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        self.expect("scales shape", tuple(packed.scales.shape), self.scale_shape(rows, cols))
        self.expect("scales dtype", packed.scales.dtype, self.scale_dtype)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape of the scales of a `[rows, cols]` matrix."""
        return (rows, cols // self.tile_cols, *self.scale_fields)

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        assert packed.scales is not None
        blocks = self.levels_of(packed.codes).view(*packed.scales.shape[:2], self.tile_cols)
        return self.apply_scales(blocks, packed.scales).view(packed.shape)

    def levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        """The levels that bytes of codes stand for, flat, float32."""
        pairs = self._pairs.to(codes.device).index_select(0, codes.int().flatten())
        return pairs.view(torch.float32)

    def apply_scales(self, level_blocks: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Levels `[rows, cols/block, block]` times (and plus) what is stored beside them."""
        return level_blocks * self.scale_values(stored).unsqueeze(-1)

    def remove_scales(self, blocks: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """The inverse of `apply_scales`; blocks whose scale is 0 become 0."""
        scales = self.scale_values(stored)
        return blocks * torch.where(scales == 0, 0, scales.reciprocal()).unsqueeze(-1)

    def encode(self, values: torch.Tensor, scales: torch.Tensor | None = None) -> PackedTensor:
        blocks = self.blocks(values)
        if scales is None:
            scales = self.covering_scales(blocks)
        codes = self.codes_of(self.nearest_levels(self.remove_scales(blocks, scales))).view(values.shape)
        even, odd = codes[:, 0::2], codes[:, 1::2]
        packed = (even | odd << 4) if self.even_is_low else (even << 4 | odd)
        return PackedTensor(self, (values.shape[0], values.shape[1]), packed, scales)

    def blocks(self, values: torch.Tensor) -> torch.Tensor:
        """`values` `[rows, cols]` as checked float32 `[rows, cols/block, block]`."""
        matrix = self.matrix(values)
        self.expect_whole_blocks(matrix.shape[1])
        return matrix.reshape(matrix.shape[0], -1, self.tile_cols)

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        assert packed.scales is not None
        shape = (stop - start, packed.shape[1])
        return PackedTensor(self, shape, packed.codes[start:stop], packed.scales[start:stop])

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        return ((rows, cols // 2), torch.uint8), (self.scale_shape(rows, cols), self.scale_dtype)

    def bytes_for(self, rows: int, cols: int) -> int:
        fields = 1
        for field in self.scale_fields:
            fields *= field
        return rows * cols // 2 + rows * (cols // self.tile_cols) * fields * self.scale_dtype.itemsize

    def expect_whole_blocks(self, cols: int) -> None:
        """Raise FormatError where rows of `cols` columns would end inside a block."""
        if cols <= 0 or cols % self.tile_cols:
            raise FormatError(
                f"{self.name}: {cols} columns are not a multiple of {self.tile_cols}; "
                "choose a format with smaller blocks or keep this matrix in bf16"
            )


def largest_magnitude(blocks: torch.Tensor) -> torch.Tensor:
    """Largest |value| of each block, `[rows, cols/block, block]` to `[rows, cols/block]`."""
    return blocks.abs().amax(-1)
