"""Plain floats as a packed format, for experts in slots: what is not packed lies there as it is.

codes  uint8 [rows, cols * bytes of a value], the values row by row; no scales
"""

from __future__ import annotations

import torch

from quant.errors import FormatError
from quant.packed import Format, PackedTensor


class Plain(Format):
    """bfloat16, float16 or float32 values."""

    tile_cols = 1

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def check(self, packed: PackedTensor) -> None:
        rows, cols = packed.shape
        self.expect("codes shape", tuple(packed.codes.shape), (rows, self.bytes_for(1, cols)))
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        self.expect("scales beside the codes", packed.scales, None)

    def values(self, packed: PackedTensor) -> torch.Tensor:
        """The matrix as a tensor of its dtype, a view where the bytes are aligned."""
        codes = packed.codes.contiguous()
        aligned = codes.storage_offset() % self.dtype.itemsize == 0
        return (codes if aligned else codes.clone()).view(self.dtype)

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        return self.values(packed).float()

    def encode(self, values: torch.Tensor, scales: torch.Tensor | None = None) -> PackedTensor:
        if scales is not None:
            raise FormatError(f"{self.name}: plain values have no scales")
        return as_packed(self.matrix(values).to(self.dtype))

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        return PackedTensor(self, (stop - start, packed.shape[1]), packed.codes[start:stop])

    def bytes_for(self, rows: int, cols: int) -> int:
        return rows * cols * self.dtype.itemsize


BF16, F16, F32 = Plain("bf16", torch.bfloat16), Plain("f16", torch.float16), Plain("f32", torch.float32)
PLAIN = {plain.dtype: plain for plain in (BF16, F16, F32)}


def as_packed(values: torch.Tensor) -> PackedTensor:
    """A matrix of floats as a packed one over the same bytes."""
    rows, cols = values.shape
    return PackedTensor(PLAIN[values.dtype], (rows, cols), values.contiguous().view(torch.uint8))
