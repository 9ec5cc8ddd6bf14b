"""The plain torch back end: decode, then compute. Slow, simple, and the reference for all others.

Decoded matrices are temporary and bounded: a large matrix is decoded one block of rows at a time, so no
weight is ever expanded as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F

from quant.errors import ConfigError
from quant.formats.plain import Plain
from quant.kernels.file_slots import FileSlotLayout
from quant.kernels.interface import (
    ExpertFormats,
    MoeCall,
    Products,
    Weight,
    apart_by_moe,
    blocks_by_products,
    moe_by_products,
    some_apart,
)
from quant.kernels.torch_layers import TorchLayers
from quant.packed import Format, PackedTensor

# Largest decoded block, in values: 4 Mi float32 values are 16 MiB.
DECODE_VALUES = 1 << 22


class ReferenceKernels(TorchLayers):
    """`Kernels` in plain torch operations, float32 throughout."""

    name = "reference"

    def __init__(self, reason: str = "") -> None:
        self.reason = reason  # why nothing faster was chosen

    def describe(self) -> str:
        return f"plain PyTorch{self.reason and ': '}{self.reason}"

    def on(self, device: torch.device) -> ReferenceKernels:
        return self

    def multiplying(self, products: Products) -> AbstractContextManager[None]:
        if products != "exact":
            raise ConfigError(f"{products} products need the compiled kernels; use exact products")
        return nullcontext()

    def prepare(self, weight: Weight) -> Weight:
        return weight

    def slot_layout(self, hidden: int, width: int, formats: Format | ExpertFormats) -> FileSlotLayout:
        """Slots in file layout."""
        return FileSlotLayout(hidden, width, formats)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x @ weight^T` of plain numbers."""
        return F.linear(x, weight)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return self.product(x, weight.to(x.dtype))
        if isinstance(weight.format, Plain):
            return self.linear(x, weight.format.values(weight))
        rows, cols = weight.shape
        tile = weight.format.tile_rows
        step = max(tile, DECODE_VALUES // cols // tile * tile)
        if step >= rows:
            return self.product(x, weight.decode(x.dtype))
        out = x.new_empty(*x.shape[:-1], rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            out[..., start:stop] = self.product(x, weight.rows(start, stop).decode(x.dtype))
        return out

    def linear_blocks(self, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        return blocks_by_products(self, x, weights)

    def moe(self, call: MoeCall) -> torch.Tensor:
        return moe_by_products(self, call)

    def moe_apart(self, call: MoeCall) -> torch.Tensor:
        return apart_by_moe(self, call)

    def moe_some(self, call: MoeCall, some: torch.Tensor, out: torch.Tensor) -> None:
        some_apart(self, call, some, out)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def sinkhorn(self, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        c = logits.softmax(-1) + eps
        c = c / (c.sum(-2, keepdim=True) + eps)
        for _ in range(iterations - 1):
            c = c / (c.sum(-1, keepdim=True) + eps)
            c = c / (c.sum(-2, keepdim=True) + eps)
        return c

    def gather_rows(self, table: PackedTensor, rows: torch.Tensor) -> torch.Tensor:
        assert table.format.tile_rows == 1
        scales = None if table.scales is None else table.scales[rows]
        part = PackedTensor(table.format, (len(rows), table.shape[1]), table.codes[rows], scales)
        return part.decode()
