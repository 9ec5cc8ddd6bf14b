"""What the GGUF types share: blocks of codes with their scales in between.

`codes` is uint8 `[rows, bytes per row]`, blocks one after the other; there are no separate scales.
Numbers are little-endian; f16 is IEEE half precision.
"""

from __future__ import annotations

import torch

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


def half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The f16 at `offset` of each block, `[blocks, 1]` float32."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """`[..., n]` bytes -> `[..., 2n]`: all low nibbles, then all high ones."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def bit_fields(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[..., n]` bytes -> `[..., 8 / bits, n]`: the lowest field of each byte, then the next."""
    mask = (1 << bits) - 1
    return torch.stack([codes >> shift & mask for shift in range(0, 8, bits)], dim=-2)
