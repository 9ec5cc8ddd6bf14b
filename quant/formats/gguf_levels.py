"""GGUF types whose 4-bit codes name levels of a table.

Byte offsets within a block; nibbles: low nibble of byte j is value j, high nibble value 16+j:

IQ4_NL  32 values in 18 bytes     value = d * level[q]
        0..1    d (f16)           2..17    q, nibbles
IQ4_XS  256 values in 136 bytes   value = d * (s - 32) * level[q]; s of 32 values
        0..1    d (f16)
        2..3    high two bits of s: bits 2k, 2k+1 of this 16-bit number
        4..7    low four bits of s: low nibble of byte 4 + k div 2 for even k, high nibble for odd
        8..135  q of values 32k .. 32k+31: bytes 8 + 16k .. 23 + 16k, nibbles
MXFP4   32 values in 17 bytes     value = e2m1[q] * 2^(e - 127)
        0       e (ue8m0)         1..16    q, nibbles

e2m1 and ue8m0 are those of `quant/formats/mxfp4.py`: the same numbers as there, in another order.
"""

from __future__ import annotations

import torch

from quant.formats.gguf_blocks import GgufFormat, bit_fields, half, nibbles
from quant.formats.mxfp4 import E2M1
from quant.formats.ue8m0 import decode_ue8m0

# Levels of IQ4_NL and IQ4_XS (ggml's kvalues_iq4nl): close together around zero.
IQ4_LEVELS = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)


class Iq4Nl(GgufFormat):
    """4-bit codes of uneven levels, one scale."""

    name, tile_cols, block_bytes = "iq4_nl", 32, 18

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return _levels(IQ4_LEVELS, nibbles(blocks[:, 2:])).mul_(half(blocks, 0))


class Iq4Xs(GgufFormat):
    """4-bit codes of uneven levels, a scale of six bits per 32 values and one over all."""

    name, tile_cols, block_bytes = "iq4_xs", 256, 136

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        low = bit_fields(blocks[:, 4:8], 4).transpose(1, 2).flatten(1)  # [blocks, 8]
        high = bit_fields(blocks[:, 2:4], 2).transpose(1, 2).flatten(1)
        scales = half(blocks, 0) * ((low | high << 4).float() - 32)
        levels = _levels(IQ4_LEVELS, nibbles(blocks[:, 8:].view(-1, 8, 16)))
        return levels.mul_(scales.unsqueeze(-1)).flatten(1)


class Mxfp4Blocks(GgufFormat):
    """MXFP4 as GGUF stores it: the scale and the codes of 32 columns side by side."""

    name, tile_cols, block_bytes = "mxfp4_gguf", 32, 17

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return _levels(E2M1, nibbles(blocks[:, 1:])).mul_(decode_ue8m0(blocks[:, :1]))


def _levels(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return table.to(codes.device).index_select(0, codes.int().flatten()).view(codes.shape)


IQ4_NL, IQ4_XS, MXFP4_BLOCKS = Iq4Nl(), Iq4Xs(), Mxfp4Blocks()
