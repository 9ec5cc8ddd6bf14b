"""MXFP4: two e2m1 codes in a byte, one ue8m0 scale per 32 columns.

byte  [row, c]   low nibble: column 2c, high nibble: column 2c+1
code  s e e m    magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign
scale [row, b]   ue8m0, for columns 32b .. 32b+31

codes  uint8 [rows, cols/2]     scales uint8 [rows, cols/32]
"""

from __future__ import annotations

import torch

from quant.formats import Format
from quant.packed import PackedTensor
from quant.ue8m0 import decode_ue8m0

BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32)


class Mxfp4(Format):
    """FP4 expert weights as DeepSeek V4 and V4.1 release them (`expert_dtype: fp4`)."""

    name = "mxfp4"
    tile_cols = BLOCK

    def check(self, packed: PackedTensor) -> None:
        rows, cols = packed.shape
        assert packed.scales is not None
        self.expect("codes shape", tuple(packed.codes.shape), (rows, cols // 2))
        self.expect("scales shape", tuple(packed.scales.shape), (rows, cols // BLOCK))
        self.expect("columns modulo 32", cols % BLOCK, 0)
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        self.expect("scales dtype", packed.scales.dtype, torch.uint8)

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        assert packed.scales is not None
        rows, cols = packed.shape
        table = E2M1.to(packed.codes.device)
        low = table[(packed.codes & 15).long()]
        high = table[(packed.codes >> 4).long()]
        values = torch.stack((low, high), dim=-1)  # [rows, cols/2, 2]
        scales = decode_ue8m0(packed.scales)
        return (values.view(rows, cols // BLOCK, BLOCK) * scales.unsqueeze(-1)).view(rows, cols)

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        assert packed.scales is not None
        shape = (stop - start, packed.shape[1])
        return PackedTensor(self, shape, packed.codes[start:stop], packed.scales[start:stop])

    def bytes_for(self, rows: int, cols: int) -> int:
        return rows * cols // 2 + rows * cols // BLOCK


MXFP4 = Mxfp4()
