"""Plain floats as formats, for experts: what holds an expert's bytes holds packed matrices.

codes `[rows, cols * bytes]` uint8, row after row; there are no scales.
"""

from __future__ import annotations

import torch

from quant.packed import Format, PackedTensor


class Plain(Format):
    """Numbers of a torch dtype."""

    tile_cols = 1

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def check(self, packed: PackedTensor) -> None:
        rows, cols = packed.shape
        self.expect("codes shape", tuple(packed.codes.shape), (rows, self.bytes_for(1, cols)))
        self.expect("codes dtype", packed.codes.dtype, torch.uint8)
        self.expect("scales beside the codes", packed.scales, None)

    def numbers(self, packed: PackedTensor) -> torch.Tensor:
        """The matrix as a tensor over the same bytes, where they are aligned."""
        codes = packed.codes
        aligned = codes.storage_offset() % self.dtype.itemsize == codes.data_ptr() % self.dtype.itemsize == 0
        return (codes if aligned else codes.clone()).view(self.dtype)

    def decode(self, packed: PackedTensor) -> torch.Tensor:
        return self.numbers(packed).float()

    def slice_rows(self, packed: PackedTensor, start: int, stop: int) -> PackedTensor:
        return PackedTensor(self, (stop - start, packed.shape[1]), packed.codes[start:stop])

    def bytes_for(self, rows: int, cols: int) -> int:
        return rows * cols * self.dtype.itemsize


BF16, F16, F32 = Plain("bf16", torch.bfloat16), Plain("f16", torch.float16), Plain("f32", torch.float32)
PLAIN = {"BF16": BF16, "F16": F16, "F32": F32}
