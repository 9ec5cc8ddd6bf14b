"""The K types of GGUF: blocks of 256 values, scales of parts of them, and one f16 over these.

In all of them value i = 128h + 32r + l (h 0..1, r 0..3, l 0..31). Byte offsets within a block:

Q2_K   84 bytes    value = d * s * q - dmin * m; s and m of 16 values
       0..15     s (low nibble) and m (high nibble)
       16..79    q: bits 2r, 2r+1 of byte 16 + 32h + l
       80..81    d (f16)      82..83   dmin (f16)
Q3_K   110 bytes   value = d * (s - 32) * (q - 4); s of 16 values
       0..31     bit 2 of q: bit 4h + r of byte l
       32..95    bits 0 and 1 of q: bits 2r, 2r+1 of byte 32 + 32h + l
       96..107   s: low four bits of number k are a nibble of byte 96 + k mod 8 (low for k < 8),
                 high two are bits 2 (k div 4) and above of byte 104 + k mod 4
       108..109  d (f16)
Q4_K   144 bytes   value = d * s * q - dmin * m; s and m of 32 values
       0..1      d (f16)      2..3     dmin (f16)
       4..15     s and m, six bits each: number k < 4 is bits 0..5 of byte 4 + k (s), 8 + k (m); of number
                 k >= 4 the low four bits are a nibble of byte 8 + k (low: s, high: m), the high two are
                 bits 6, 7 of byte k (s), 4 + k (m)
       16..143   q: low nibble (even r) or high nibble (odd r) of byte 16 + 64h + 32 (r div 2) + l
Q5_K   176 bytes   as Q4_K, with five bits of q
       0..15     as Q4_K
       16..47    bit 4 of q: bit 4h + r of byte 16 + l
       48..175   bits 0..3 of q, as in Q4_K
Q6_K   210 bytes   value = d * s * (q - 32); s of 16 values
       0..127    low four bits of q: low nibble (r < 2) or high nibble (r >= 2) of byte 64h + 32 (r mod 2) + l
       128..191  high two bits of q: bits 2r, 2r+1 of byte 128 + 32h + l
       192..207  s (int8)     208..209 d (f16)
"""

from __future__ import annotations

import torch

from quant.formats.gguf_blocks import GgufFormat, bit_fields, half, nibbles

VALUES = 256


class Q2K(GgufFormat):
    """2-bit codes, a scale and a minimum of four bits per 16 values."""

    name, tile_cols, block_bytes = "q2_k", VALUES, 84

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        codes = bit_fields(blocks[:, 16:80].view(-1, 2, 32), 2).reshape(-1, 16, 16).float()
        scales, mins = (blocks[:, :16] & 15).float(), (blocks[:, :16] >> 4).float()
        return _scaled(codes, half(blocks, 80) * scales, half(blocks, 82) * mins)


class Q3K(GgufFormat):
    """3-bit codes around zero, a scale of six bits per 16 values."""

    name, tile_cols, block_bytes = "q3_k", VALUES, 110

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        low = bit_fields(blocks[:, 32:96].view(-1, 2, 32), 2).reshape(-1, VALUES)
        high = bit_fields(blocks[:, :32], 1).reshape(-1, VALUES)
        codes = (low | high << 2).view(-1, 16, 16).float() - 4
        top = bit_fields(blocks[:, 104:108], 2).reshape(-1, 16)
        scales = (nibbles(blocks[:, 96:104]) | top << 4).float() - 32
        return _scaled(codes, half(blocks, 108) * scales)


class Q4K(GgufFormat):
    """4-bit codes, a scale and a minimum of six bits per 32 values."""

    name, tile_cols, block_bytes = "q4_k", VALUES, 144

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        codes = bit_fields(blocks[:, 16:].view(-1, 4, 32), 4).reshape(-1, 8, 32).float()
        scales, mins = _six_bits(blocks[:, 4:16])
        return _scaled(codes, half(blocks, 0) * scales, half(blocks, 2) * mins)


class Q5K(GgufFormat):
    """5-bit codes, a scale and a minimum of six bits per 32 values."""

    name, tile_cols, block_bytes = "q5_k", VALUES, 176

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        low = bit_fields(blocks[:, 48:].view(-1, 4, 32), 4).reshape(-1, 8, 32)
        codes = (low | bit_fields(blocks[:, 16:48], 1) << 4).float()
        scales, mins = _six_bits(blocks[:, 4:16])
        return _scaled(codes, half(blocks, 0) * scales, half(blocks, 2) * mins)


class Q6K(GgufFormat):
    """6-bit codes around zero, a scale of eight bits per 16 values."""

    name, tile_cols, block_bytes = "q6_k", VALUES, 210

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        low = bit_fields(blocks[:, :128].view(-1, 2, 64), 4).reshape(-1, VALUES)
        high = bit_fields(blocks[:, 128:192].view(-1, 2, 32), 2).reshape(-1, VALUES)
        codes = (low | high << 4).view(-1, 16, 16).float() - 32
        return _scaled(codes, half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and minima of Q4_K and Q5_K, `[blocks, 12]` bytes -> `[blocks, 8]` float32 each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | first >> 6 << 4), dim=1)
    mins = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales.float(), mins.float()


def _scaled(codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None = None) -> torch.Tensor:
    """codes `[blocks, parts, n]` times scales less minima `[blocks, parts]`, as `[blocks, parts * n]`."""
    values = codes.mul_(scales.unsqueeze(-1))
    if mins is not None:
        values.sub_(mins.unsqueeze(-1))
    return values.flatten(1)


Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = Q2K(), Q3K(), Q4K(), Q5K(), Q6K()
