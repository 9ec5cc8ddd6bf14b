"""FP8: e4m3 codes with a scale per tile.

code   s eeee mmm          e4m3fn: no infinities, 0x7f and 0xff are NaN, largest 448
scale  [row/R, col/C]      ue8m0 (uint8) or float32; bfloat16 ones of files become float32

FP8_32     R = C = 32      dense weights of V4.1
FP8_128    R = C = 128     dense weights of V3, V3.2 (float32 scales) and V4 (ue8m0)
FP8_ROW    R = 1, C = 32   rows of Engram tables

codes  uint8 [rows, cols]   scales [ceil(rows/R), ceil(cols/C)]

value = e4m3(code) * scale. The last tiles may be cut by the matrix.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from quant.errors import FormatError
from quant.formats.ue8m0 import covering_scale, decode_ue8m0, inverse_ue8m0, refuse_nan
from quant.packed import Format, PackedTensor, Part

E4M3_LARGEST = 448.0
MIN_FLOAT_SCALE = torch.finfo(torch.float32).tiny


class Fp8(Format):
    """e4m3 values in tiles of `tile_rows` by `tile_cols`."""

    def __init__(self, name: str, tile_rows: int, tile_cols: int) -> None:
        self.name = name
        self.tile_rows = tile_rows
        self.tile_cols = tile_cols

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the scales of a `[rows, cols]` matrix."""
        return -(-rows // self.tile_rows), -(-cols // self.tile_cols)

    def check(self, packed: PackedTensor) -> None:
        rows, cols = packed.shape
        if packed.scales is None:
            raise FormatError(f"{self.name}: scales are missing")
        self.expect("codes shape", tuple(packed.codes.shape), (rows, cols))
        self.expect("scales shape", tuple(packed.scales.shape), self.scale_shape(rows, cols))
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        if packed.scales.dtype not in (torch.uint8, torch.float32):
            self.expect("scales dtype", packed.scales.dtype, "uint8 (ue8m0) or float32")

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        assert packed.scales is not None
        values = packed.codes.view(torch.float8_e4m3fn).to(torch.float32)
        return values * self._per_value(self.scale_values(packed.scales), packed.shape)

    def scale_values(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales of either kind as float32, which holds them exactly."""
        return scales if scales.dtype == torch.float32 else decode_ue8m0(scales)

    def encode(self, values: torch.Tensor, scales: torch.Tensor | None = None) -> PackedTensor:
        """As `Format.encode`; scales default to `power_scales`, `float_scales` are the other choice."""
        values = self.matrix(values)
        shape = (values.shape[0], values.shape[1])
        if scales is None:
            scales = self.power_scales(values)
        inverse = inverse_ue8m0(scales) if scales.dtype == torch.uint8 else scales.reciprocal()
        scaled = values * self._per_value(inverse, shape)
        codes = scaled.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return PackedTensor(self, shape, codes, scales)

    def power_scales(self, values: torch.Tensor) -> torch.Tensor:
        """ue8m0 scales, uint8: the smallest powers of two that clip nothing."""
        return covering_scale(self._largest_per_tile(values), E4M3_LARGEST)

    def float_scales(self, values: torch.Tensor) -> torch.Tensor:
        """float32 scales that map each tile's largest magnitude to 448; never subnormal."""
        return (self._largest_per_tile(values) / E4M3_LARGEST).clamp(min=MIN_FLOAT_SCALE)

    def validate(self, packed: PackedTensor) -> None:
        assert packed.scales is not None
        if packed.scales.dtype == torch.uint8:
            refuse_nan(packed.scales, self.name)
        elif not bool(packed.scales.isfinite().all()):
            raise FormatError(f"{self.name}: a scale is NaN or infinite; the file is damaged")
        super().validate(packed)

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        assert packed.scales is not None
        first, last = start // self.tile_rows, -(-stop // self.tile_rows)
        shape = (stop - start, packed.shape[1])
        return PackedTensor(self, shape, packed.codes[start:stop], packed.scales[first:last])

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """As `Format.parts`, with float32 scales: these hold any that a file has."""
        return ((rows, cols), torch.uint8), (self.scale_shape(rows, cols), torch.float32)

    def bytes_for(self, rows: int, cols: int) -> int:
        scale_rows, scale_cols = self.scale_shape(rows, cols)
        return rows * cols + scale_rows * scale_cols

    def _largest_per_tile(self, values: torch.Tensor) -> torch.Tensor:
        rows, cols = values.shape
        tall, wide = self.scale_shape(rows, cols)
        padding = (0, wide * self.tile_cols - cols, 0, tall * self.tile_rows - rows)
        tiles = F.pad(values, padding).view(tall, self.tile_rows, wide, self.tile_cols)
        return tiles.abs().amax((1, 3)).float()

    def _per_value(self, scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Each tile's scale at each of its values, `[rows, cols]`."""
        if self.tile_rows > 1:
            scales = scales.repeat_interleave(self.tile_rows, dim=0)[: shape[0]]
        return scales.repeat_interleave(self.tile_cols, dim=1)[:, : shape[1]]


FP8_32 = Fp8("fp8_32x32", 32, 32)
FP8_128 = Fp8("fp8_128x128", 128, 128)
FP8_ROW = Fp8("fp8_row32", 1, 32)
