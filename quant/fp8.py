"""FP8: e4m3 codes with a scale per tile.

code   s eeee mmm          e4m3fn: no infinities, 0x7f and 0xff are NaN, largest 448
scale  [row/R, col/C]      ue8m0 (uint8) or float32

FP8_32     R = C = 32      dense weights of V4.1
FP8_128    R = C = 128     dense weights of V3, V3.2 (float32 scales) and V4 (ue8m0)
FP8_ROW    R = 1, C = 32   rows of Engram tables

codes  uint8 [rows, cols]   scales [ceil(rows/R), ceil(cols/C)]
"""

from __future__ import annotations

import torch

from quant.formats import Format
from quant.packed import PackedTensor
from quant.ue8m0 import decode_ue8m0


class Fp8(Format):
    """e4m3 values in tiles of `tile_rows` by `tile_cols`; the last tiles may be cut by the matrix."""

    def __init__(self, name: str, tile_rows: int, tile_cols: int) -> None:
        self.name = name
        self.tile_rows = tile_rows
        self.tile_cols = tile_cols

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape of the scales of a `[rows, cols]` matrix."""
        return -(-rows // self.tile_rows), -(-cols // self.tile_cols)

    def check(self, packed: PackedTensor) -> None:
        rows, cols = packed.shape
        assert packed.scales is not None
        self.expect("codes shape", tuple(packed.codes.shape), (rows, cols))
        self.expect("scales shape", tuple(packed.scales.shape), self.scale_shape(rows, cols))
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        if packed.scales.dtype not in (torch.uint8, torch.float32):
            self.expect("scales dtype", packed.scales.dtype, "uint8 (ue8m0) or float32")

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        assert packed.scales is not None
        rows, cols = packed.shape
        values = packed.codes.view(torch.float8_e4m3fn).to(torch.float32)
        scales = packed.scales if packed.scales.dtype == torch.float32 else decode_ue8m0(packed.scales)
        if self.tile_rows > 1:
            scales = scales.repeat_interleave(self.tile_rows, dim=0)[:rows]
        return values * scales.repeat_interleave(self.tile_cols, dim=1)[:, :cols]

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        assert packed.scales is not None
        first, last = start // self.tile_rows, -(-stop // self.tile_rows)
        shape = (stop - start, packed.shape[1])
        return PackedTensor(self, shape, packed.codes[start:stop], packed.scales[first:last])

    def bytes_for(self, rows: int, cols: int) -> int:
        scale_rows, scale_cols = self.scale_shape(rows, cols)
        return rows * cols + scale_rows * scale_cols


FP8_32 = Fp8("fp8_32x32", 32, 32)
FP8_128 = Fp8("fp8_128x128", 128, 128)
FP8_ROW = Fp8("fp8_row32", 1, 32)
