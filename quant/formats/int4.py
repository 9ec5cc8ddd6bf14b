"""INT4: two 4-bit integers in a byte, one scale (and where wanted one offset) per group of columns.

byte  [row, c]   low nibble: column 2c, high nibble: column 2c+1
code  0..15      stands for code - 8, so -8 .. 7

INT4_32, INT4_64, INT4_128              value = (code - 8) * scale
    scales bfloat16 [rows, cols/group]
INT4_OFFSET_32, _64, _128               value = (code - 8) * scale + offset
    scales bfloat16 [rows, cols/group, 2], (scale, offset)
INT4_F16_32, _64, _128                  as the first, scales float16
INT4_OFFSET_F32_32, _64, _128           as the second, scales and offsets float32

codes  uint8 [rows, cols/2]

A scale may be negative: then -8 codes the largest positive value. The integer zero points of AWQ
and GPTQ are the offset (8 - zero) * scale, which float32 holds exactly for float16 scales: their checkpoints
are read as the last two, without rounding. torch's int4pack kernels take (code, scale, offset) as here.
Codes are chosen for the scale and offset as stored, so rounding those to bfloat16 costs next to nothing.
"""

from __future__ import annotations

import torch

from quant.errors import FormatError
from quant.formats.four_bit import TINY, FourBit
from quant.packed import PackedTensor

LEVELS = torch.arange(16, dtype=torch.float32) - 8
MAX_SCALE = 2.0**124  # -8 * scale stays within float32, beside any offset up to
MAX_OFFSET = 2.0**127


class Int4(FourBit):
    """Symmetric groups: a scale, no offset."""

    def __init__(self, group: int, prefix: str = "int4", scale_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(f"{prefix}_{group}", group, LEVELS, scale_dtype, even_is_low=True)
        limits = torch.finfo(scale_dtype)
        self.min_scale, self.max_scale = limits.tiny, min(limits.max, MAX_SCALE)

    def covering_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        # The side that reaches further from zero gets code 0 (-8), of which the other has no equal.
        low, high = blocks.amin(-1), blocks.amax(-1)
        mirrored = high > -low
        further, other = torch.where(mirrored, high, -low), torch.where(mirrored, -low, high)
        magnitude = self._rounded_up(torch.maximum(further / 8, other / 7))
        return torch.where(mirrored, -magnitude, magnitude)

    def store(self, scales: torch.Tensor) -> torch.Tensor:
        magnitude = scales.abs().clamp(self.min_scale, self.max_scale)
        return torch.copysign(magnitude, scales).to(self.scale_dtype)

    def scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.float()

    def nearest_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp_(-8, 7)

    def codes_of(self, levels: torch.Tensor) -> torch.Tensor:
        return (levels + 8).to(torch.uint8)

    def validate(self, packed: PackedTensor) -> None:
        assert packed.scales is not None
        if not bool(packed.scales.isfinite().all()):
            raise FormatError(f"{self.name}: a scale is NaN or infinite; the file is damaged")
        if bool((packed.scales.abs() > MAX_SCALE).any()):
            super().validate(packed)

    def _rounded_up(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """As stored, never rounded down, so that nothing is clipped; within what decodes without overflow."""
        magnitudes = magnitudes.clamp(self.min_scale, self.max_scale)
        nearest = magnitudes.to(self.scale_dtype)
        if self.scale_dtype.itemsize > 2:
            return nearest
        one_up = (nearest.float() < magnitudes).to(torch.int16)
        return (nearest.view(torch.int16) + one_up).view(self.scale_dtype)


class Int4Offset(Int4):
    """Asymmetric groups: a scale and an offset, for values that do not lie around zero."""

    scale_fields = (2,)

    def __init__(
        self, group: int, prefix: str = "int4_offset", scale_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__(group, prefix, scale_dtype)

    def covering_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        low, high = blocks.amin(-1), blocks.amax(-1)
        # Codes reach 8 steps below the offset and 7 above. The offset is rounded first, so that the
        # scale covers both sides of the offset as stored.
        offset = self._stored_offset(low * (7 / 15) + high * (8 / 15))
        scale = self._rounded_up(torch.maximum((offset.float() - low) / 8, (high - offset.float()) / 7))
        return torch.stack((scale, offset), dim=-1)

    def scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        return stored[..., 0].float()

    def rescaled(self, stored: torch.Tensor, factor: float) -> torch.Tensor:
        scale = self.scale_values(stored)
        smaller = self.store(scale * factor)
        # The middle of 16 levels lies half a step below the offset.
        offset = stored[..., 1].float() - scale / 2 + smaller.float() / 2
        return torch.stack((smaller, self._stored_offset(offset)), dim=-1)

    def fitted(self, blocks: torch.Tensor, levels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `FourBit.fitted`: a weighted regression line, then the best scale for the offset as rounded."""
        weights = weights.expand(-1, self.tile_cols)
        share = weights / weights.sum(-1, keepdim=True)
        mean_value, mean_level = (share * blocks).sum(-1), (share * levels).sum(-1)
        around = levels - mean_level.unsqueeze(-1)
        slope = (share * around * blocks).sum(-1) / (share * around.square()).sum(-1).clamp(min=TINY)
        offset = self._stored_offset(mean_value - slope * mean_level)
        scale = super().fitted(blocks - offset.float().unsqueeze(-1), levels, weights)
        return torch.stack((scale, offset), dim=-1)

    def apply_scales(self, level_blocks: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return super().apply_scales(level_blocks, stored) + stored[..., 1].float().unsqueeze(-1)

    def remove_scales(self, blocks: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return super().remove_scales(blocks - stored[..., 1].float().unsqueeze(-1), stored)

    def _stored_offset(self, offsets: torch.Tensor) -> torch.Tensor:
        return offsets.clamp(-MAX_OFFSET, MAX_OFFSET).to(self.scale_dtype)


class Int4Half(Int4):
    """Symmetric groups with float16 scales, as GPTQ stores them."""

    def __init__(self, group: int) -> None:
        super().__init__(group, "int4_f16", torch.float16)


class Int4OffsetFloat(Int4Offset):
    """Asymmetric groups with float32 scales and offsets, which hold what AWQ and GPTQ store."""

    def __init__(self, group: int) -> None:
        super().__init__(group, "int4_offset_f32", torch.float32)


INT4_32, INT4_64, INT4_128 = Int4(32), Int4(64), Int4(128)
INT4_OFFSET_32, INT4_OFFSET_64, INT4_OFFSET_128 = Int4Offset(32), Int4Offset(64), Int4Offset(128)
INT4_GROUPS = {32: INT4_32, 64: INT4_64, 128: INT4_128}
INT4_OFFSET_GROUPS = {32: INT4_OFFSET_32, 64: INT4_OFFSET_64, 128: INT4_OFFSET_128}
INT4_HALF_GROUPS = {group: Int4Half(group) for group in INT4_GROUPS}
INT4_OFFSET_FLOAT_GROUPS = {group: Int4OffsetFloat(group) for group in INT4_GROUPS}
