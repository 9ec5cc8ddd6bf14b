"""The GGUF types of 32 values that older files use, and newer ones where a row is no whole number of 256.

Byte offsets within a block; nibbles: low nibble of byte j is value j, high nibble value 16+j:

Q4_0   18 bytes   value = d * (q - 8)    0..1 d (f16)   2..17 q, nibbles
Q4_1   20 bytes   value = d * q + m      0..1 d (f16)   2..3 m (f16)   4..19 q, nibbles
Q5_0   22 bytes   value = d * (q - 16)   0..1 d (f16)   2..5 high bits   6..21 low bits of q, nibbles
Q5_1   24 bytes   value = d * q + m      0..1 d (f16)   2..3 m (f16)   4..7 high bits   8..23 low bits of q
                  bit j of the high bits (a 32-bit number) is bit 4 of value j
Q8_0   34 bytes   value = d * q          0..1 d (f16)   2..33 q, int8
"""

from __future__ import annotations

import torch

from quant.formats.gguf_blocks import GgufFormat, half, nibbles


class Q40(GgufFormat):
    """4-bit codes around zero, one scale."""

    name, tile_cols, block_bytes = "q4_0", 32, 18

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return nibbles(blocks[:, 2:]).float().sub_(8).mul_(half(blocks, 0))


class Q41(GgufFormat):
    """4-bit codes, a scale and a minimum."""

    name, tile_cols, block_bytes = "q4_1", 32, 20

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return nibbles(blocks[:, 4:]).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


class Q50(GgufFormat):
    """5-bit codes around zero, one scale."""

    name, tile_cols, block_bytes = "q5_0", 32, 22

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return _five_bits(blocks[:, 2:]).sub_(16).mul_(half(blocks, 0))


class Q51(GgufFormat):
    """5-bit codes, a scale and a minimum."""

    name, tile_cols, block_bytes = "q5_1", 32, 24

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return _five_bits(blocks[:, 4:]).mul_(half(blocks, 0)).add_(half(blocks, 2))


class Q80(GgufFormat):
    """8-bit codes, one scale."""

    name, tile_cols, block_bytes = "q8_0", 32, 34

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def _five_bits(codes: torch.Tensor) -> torch.Tensor:
    """`[blocks, 20]`: four bytes of high bits, then nibbles -> `[blocks, 32]` float32."""
    bit = torch.arange(8, device=codes.device, dtype=torch.uint8)
    high = (codes[:, :4].unsqueeze(-1) >> bit & 1).flatten(1)  # [blocks, 32]
    return (nibbles(codes[:, 4:]) | high << 4).float()


Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = Q40(), Q41(), Q50(), Q51(), Q80()
