"""The GGUF types of the llama family: blocks of codes with their scales in between.

`codes` is uint8 `[rows, bytes per row]`, blocks one after the other; there are no separate scales.
Numbers are little-endian; f16 is IEEE half precision. Byte offsets within a block:

Q4_0   32 values in 18 bytes    value = d * (q - 8)
       0..1    d    f16
       2..17   q    byte 2+j: low nibble is value j, high nibble value 16+j
Q4_1   32 values in 20 bytes    value = d * q + m
       0..1    d    f16
       2..3    m    f16
       4..19   q    byte 4+j: low nibble is value j, high nibble value 16+j
Q8_0   32 values in 34 bytes    value = d * q
       0..1    d    f16
       2..33   q    int8
Q6_K   256 values in 210 bytes  value = d * s * (q - 32); s is one of 16 sub-block scales
       0..127    low 4 bits of q, 128..191 high 2 bits of q, 192..207 s (int8), 208..209 d (f16)
       value i = 128h + 32r + l (h 0..1, r 0..3, l 0..31):
         low nibble (r < 2) or high nibble (r >= 2) of byte 64h + 32(r mod 2) + l,
         bits 2r, 2r+1 of byte 128 + 32h + l above it, scale number i div 16

F32, F16 and BF16 are plain tensors.
"""

from __future__ import annotations

import math

import torch

from quant.errors import FormatError
from quant.packed import Format, PackedTensor


class GgufFormat(Format):
    """A GGUF type: `tile_cols` values in `block_bytes` bytes."""

    block_bytes: int

    def check(self, packed: PackedTensor) -> None:
        rows, cols = packed.shape
        self.expect(f"columns modulo {self.tile_cols}", cols % self.tile_cols, 0)
        self.expect("codes shape", tuple(packed.codes.shape), (rows, self.bytes_for(1, cols)))
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        self.expect("scales beside the codes", packed.scales, None)

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        rows, cols = packed.shape
        blocks = packed.codes.reshape(rows * cols // self.tile_cols, self.block_bytes)
        return self.decode_blocks(blocks).view(rows, cols)

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """`[blocks, block_bytes]` uint8 -> `[blocks, tile_cols]` float32."""
        raise NotImplementedError

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        return PackedTensor(self, (stop - start, packed.shape[1]), packed.codes[start:stop])

    def bytes_for(self, rows: int, cols: int) -> int:
        return rows * cols // self.tile_cols * self.block_bytes


class Q40(GgufFormat):
    """4-bit codes around zero, one scale."""

    name, tile_cols, block_bytes = "q4_0", 32, 18

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0))


class Q41(GgufFormat):
    """4-bit codes, a scale and a minimum."""

    name, tile_cols, block_bytes = "q4_1", 32, 20

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


class Q80(GgufFormat):
    """8-bit codes, one scale."""

    name, tile_cols, block_bytes = "q8_0", 32, 34

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


class Q6K(GgufFormat):
    """6-bit codes, a scale per 16 values and one over all."""

    name, tile_cols, block_bytes = "q6_k", 256, 210

    def decode_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        count = len(blocks)
        low = blocks[:, :128].view(count, 2, 1, 2, 32)
        low = torch.cat((low & 15, low >> 4), dim=2).view(count, 2, 4, 32)  # [blocks, h, r, l]
        high = blocks[:, 128:192].view(count, 2, 1, 32)
        high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)  # [blocks, h, r, l]
        codes = (low | high << 4).view(count, 16, 16).float() - 32
        scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # [blocks, 16]
        return (scales.unsqueeze(-1) * codes).view(count, 256)


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The f16 at `offset` of each block, `[blocks, 1]` float32."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """`[blocks, n]` bytes -> `[blocks, 2n]` float32: all low nibbles, then all high ones."""
    count, half = codes.shape
    values = torch.empty(count, 2 * half, device=codes.device)
    values[:, :half] = codes & 15
    values[:, half:] = codes >> 4
    return values


Q4_0, Q4_1, Q8_0, Q6_K = Q40(), Q41(), Q80(), Q6K()

# Type names as GGUF files state them.
FORMATS: dict[str, GgufFormat] = {"Q4_0": Q4_0, "Q4_1": Q4_1, "Q8_0": Q8_0, "Q6_K": Q6_K}
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_from_bytes(dtype: str, shape: tuple[int, ...], data: torch.Tensor) -> torch.Tensor | PackedTensor:
    """A tensor of GGUF type `dtype` over its bytes, not copied where they are aligned.

    `data` is uint8 `[nbytes]`; a packed type needs a `[rows, cols]` shape. Raises FormatError for a
    type that is not read and for bytes that do not fit the shape.
    """
    if dtype in PLAIN_DTYPES:
        plain = PLAIN_DTYPES[dtype]
        if data.numel() != math.prod(shape) * plain.itemsize:
            raise FormatError(f"{dtype}: {data.numel()} bytes, expected {math.prod(shape) * plain.itemsize}")
        aligned = data.data_ptr() % plain.itemsize == 0 and data.storage_offset() % plain.itemsize == 0
        return (data if aligned else data.clone()).view(plain).view(shape)
    if dtype not in FORMATS:
        raise FormatError(
            f"GGUF type {dtype} is not supported; known: {', '.join((*FORMATS, *PLAIN_DTYPES))}"
        )
    if len(shape) != 2:
        raise FormatError(f"{dtype}: shape {list(shape)}, expected a matrix")
    rows, cols = shape
    format_ = FORMATS[dtype]
    row_bytes = format_.bytes_for(1, cols)
    format_.expect("bytes", data.numel(), rows * row_bytes)
    return PackedTensor(format_, (rows, cols), data.view(rows, row_bytes))
