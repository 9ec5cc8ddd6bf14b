"""MXFP4: two e2m1 codes in a byte, one ue8m0 scale per 32 columns.

byte  [row, c]   low nibble: column 2c, high nibble: column 2c+1
code  s e e m    magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign
scale [row, b]   ue8m0, for columns 32b .. 32b+31

codes  uint8 [rows, cols/2]     scales uint8 [rows, cols/32]

Source: OCP Microscaling Formats 1.0; FP4 experts as DeepSeek V4 and V4.1 release them. Encoding
rounds to nearest, ties to the even code, as the conversion instructions of GPUs do.
"""

from __future__ import annotations

import torch

from quant.four_bit import FourBit, largest_magnitude
from quant.packed import PackedTensor
from quant.ue8m0 import BIAS, covering_scale, decode_ue8m0, largest_code, refuse_nan

BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32)
E2M1_LARGEST = 6.0


class Mxfp4(FourBit):
    """FP4 expert weights (`expert_dtype: fp4`)."""

    def __init__(self) -> None:
        super().__init__("mxfp4", BLOCK, E2M1, torch.uint8, even_is_low=True)

    def covering_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        return covering_scale(largest_magnitude(blocks), E2M1_LARGEST)

    def store(self, scales: torch.Tensor) -> torch.Tensor:
        codes = scales.abs().log2().round() + BIAS
        return codes.clamp(0, largest_code(E2M1_LARGEST)).to(torch.uint8)

    def scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        return decode_ue8m0(stored)

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        magnitude = scaled.abs().clamp(max=E2M1_LARGEST)
        # Codes 0..4 step by 0.5, 4..6 by 1, 6..7 by 2. `round` is to nearest even.
        fine = (magnitude * 2).round()
        middle = magnitude.round() + 2
        coarse = (magnitude / 2).round() + 4
        code = torch.where(magnitude < 2, fine, torch.where(magnitude < 4, middle, coarse))
        return code.to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3

    def validate(self, packed: PackedTensor) -> None:
        assert packed.scales is not None
        refuse_nan(packed.scales, self.name)
        if bool((packed.scales > largest_code(E2M1_LARGEST)).any()):
            super().validate(packed)


MXFP4 = Mxfp4()
