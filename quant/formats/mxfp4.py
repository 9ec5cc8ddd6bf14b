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

from quant.formats.four_bit import FourBit, largest_magnitude
from quant.formats.ue8m0 import BIAS, covering_scale, decode_ue8m0, largest_code, refuse_nan
from quant.packed import PackedTensor

BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32)
E2M1_LARGEST = 6.0
EXPONENT_BITS = 0x7F800000  # of a float32


class Mxfp4(FourBit):
    """FP4 expert weights (`expert_dtype: fp4`)."""

    search_factors = (0.5,)

    def __init__(self, name: str = "mxfp4", block: int = BLOCK) -> None:
        super().__init__(name, block, E2M1, torch.uint8, even_is_low=True)
        self._codes_of_twice = torch.zeros(13, dtype=torch.uint8)
        self._codes_of_twice[(E2M1[:8] * 2).long()] = torch.arange(8, dtype=torch.uint8)

    def covering_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        return covering_scale(largest_magnitude(blocks), E2M1_LARGEST)

    def store(self, scales: torch.Tensor) -> torch.Tensor:
        codes = scales.abs().log2().round() + BIAS
        return codes.clamp(0, largest_code(E2M1_LARGEST)).to(torch.uint8)

    def scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        return decode_ue8m0(stored)

    def nearest_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        # Levels are a step apart that doubles with each power of two from 1 on: 0.5, 1, 2. The step is
        # half of the value with its mantissa bits cleared; `round` is to nearest even.
        clamped = scaled.abs().clamp_(1.0, 4.0)
        step = (clamped.view(torch.int32) & EXPONENT_BITS).view(torch.float32).mul_(0.5)
        return (scaled / step).round_().mul_(step).clamp_(-E2M1_LARGEST, E2M1_LARGEST)

    def codes_of(self, levels: torch.Tensor) -> torch.Tensor:
        twice = (levels.abs() * 2).to(torch.int32).flatten()
        codes = self._codes_of_twice.to(levels.device).index_select(0, twice).view(levels.shape)
        return codes | (levels < 0).to(torch.uint8) << 3

    def validate(self, packed: PackedTensor) -> None:
        assert packed.scales is not None
        refuse_nan(packed.scales, self.name)
        if bool((packed.scales > largest_code(E2M1_LARGEST)).any()):
            super().validate(packed)


MXFP4 = Mxfp4()
