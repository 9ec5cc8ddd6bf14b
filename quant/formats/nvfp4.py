"""NVFP4: two e2m1 codes in a byte, one e4m3 scale per 16 columns, one float32 factor per row.

byte   [row, c]  low nibble: column 2c, high nibble: column 2c+1; codes as in `mxfp4.py`
scales [row]     cols/16 bytes e4m3, one for columns 16b .. 16b+15, then four bytes: a float32

codes  uint8 [rows, cols/2]     scales uint8 [rows, cols/16 + 4]

value = e2m1 * e4m3 * factor. Files have one factor for a matrix; here each row has it, so that rows can be
taken apart.
"""

from __future__ import annotations

import torch

from quant.errors import FormatError
from quant.formats.four_bit import largest_magnitude
from quant.formats.fp8 import E4M3_LARGEST, MIN_FLOAT_SCALE
from quant.formats.mxfp4 import E2M1_LARGEST, Mxfp4
from quant.packed import PackedTensor

BLOCK = 16
FACTOR_BYTES = 4


class Nvfp4(Mxfp4):
    """FP4 with finer scales, as NVIDIA's tools and compressed-tensors export it."""

    def __init__(self) -> None:
        super().__init__("nvfp4", BLOCK)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return rows, cols // BLOCK + FACTOR_BYTES

    def bytes_for(self, rows: int, cols: int) -> int:
        return rows * (cols // 2 + cols // BLOCK + FACTOR_BYTES)

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        assert packed.scales is not None
        rows, cols = packed.shape
        scales, factors = _parts(packed.scales)
        levels = self.levels_of(packed.codes).view(rows, -1, BLOCK)
        return (levels * scales.unsqueeze(-1)).view(rows, cols) * factors

    def covering_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        largest = largest_magnitude(blocks)
        factor = (largest.amax() / (E4M3_LARGEST * E2M1_LARGEST)).clamp(min=MIN_FLOAT_SCALE)
        wanted = (largest / E2M1_LARGEST / factor).clamp(max=E4M3_LARGEST)
        codes = wanted.to(torch.float8_e4m3fn)
        one_up = (codes.float() < wanted).to(torch.uint8)
        return with_factors(codes.view(torch.uint8) + one_up, factor)

    def store(self, scales: torch.Tensor) -> torch.Tensor:
        raise FormatError("nvfp4: only covering scales are made")

    def scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        scales, factors = _parts(stored)
        return scales * factors

    def validate(self, packed: PackedTensor) -> None:
        assert packed.scales is not None
        if not bool(self.scale_values(packed.scales).isfinite().all()):
            raise FormatError("nvfp4: a scale is NaN or infinite; the file is damaged, download it again")


def _parts(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales `[rows, cols/16]` and factors `[rows, 1]`, float32."""
    scales, factors = stored.tensor_split([stored.shape[1] - FACTOR_BYTES], dim=1)
    # cloned: as numbers of four bytes they must begin at a multiple of four
    factors = factors.clone(memory_format=torch.contiguous_format)
    return scales.view(torch.float8_e4m3fn).float(), factors.view(torch.float32)


def with_factors(scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """e4m3 scales `[rows, cols/16]` uint8 and a matrix's factor (one float32), as this format stores them."""
    factors = factor.reshape(1).float().expand(len(scales)).contiguous().view(torch.uint8)
    return torch.cat((scales, factors.view(len(scales), FACTOR_BYTES)), dim=1)


NVFP4 = Nvfp4()
