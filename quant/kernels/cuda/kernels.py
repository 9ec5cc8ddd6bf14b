"""The Triton back end: CUDA GPUs; and, for tests, any machine in Triton's interpreter.

Formats without a kernel here (GGUF) are decoded one block of rows at a time and multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.nn import functional as F

from quant.formats.fp8 import Fp8
from quant.kernels.cuda.decode import four_bit_kind
from quant.kernels.cuda.launch import Launcher
from quant.kernels.cuda.linear import linear_launch
from quant.kernels.cuda.moe import moe_launches, schedule
from quant.kernels.cuda.rows import gather_launch
from quant.kernels.cuda.sinkhorn import sinkhorn_launch
from quant.kernels.cuda.slots import GpuSlotLayout
from quant.kernels.interface import (
    NO_EXTRAS,
    ExpertFormats,
    MoeCall,
    Products,
    Weight,
    apart_by_moe,
    blocks_by_products,
    moe_by_products,
    some_apart,
)
from quant.kernels.reference import DECODE_VALUES, ReferenceKernels
from quant.kernels.torch_layers import TorchLayers
from quant.packed import Format, PackedTensor

# How many outputs (float32) of pairs of token and expert wait for their sums, at most; they are computed some
# multiple of so many columns at a time.
MOST_OUTPUTS = 1 << 26
COLUMNS = 128


class TritonKernels(TorchLayers):
    """`Kernels` on one device; activations are float32 or bfloat16, results are of the same dtype.

    Products in bfloat16 (`multiplying`) round float32 activations and keep float32 results. Recorded steps
    stay exact.

    device    where `prepare` moves weights
    launcher  starts the kernels
    """

    name = "triton"

    def __init__(self, device: torch.device, launcher: Launcher | None = None) -> None:
        self.device = device
        self.launcher = launcher or Launcher()
        self._reference = ReferenceKernels()
        self._products: Products = "exact"

    def describe(self) -> str:
        if self.device.type != "cuda":
            return f"Triton on {self.device}"
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"Triton on {torch.cuda.get_device_name(self.device)} (sm_{major}{minor})"

    def on(self, device: torch.device) -> TritonKernels:
        return self

    @contextmanager
    def multiplying(self, products: Products) -> Iterator[None]:
        before, self._products = self._products, products
        try:
            yield
        finally:
            self._products = before

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Activations as products take them now."""
        return x.bfloat16() if self._products == "bf16" else x

    def prepare(self, weight: Weight) -> Weight:
        if isinstance(weight, torch.Tensor):
            return weight.to(self.device)
        scales = None if weight.scales is None else weight.scales.to(self.device)
        return PackedTensor(weight.format, weight.shape, weight.codes.to(self.device), scales)

    def slot_layout(self, hidden: int, width: int, formats: Format | ExpertFormats) -> GpuSlotLayout:
        """Slots in file layout, and the conversion from the CPU's panels."""
        return GpuSlotLayout(hidden, width, formats)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            if weight.dtype == x.dtype:
                return F.linear(x, weight)
            has_kernel = (x.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
            if not has_kernel or weight.numel() >= 2**31 or not weight.is_contiguous():
                return self._converted(x, weight)
        elif four_bit_kind(weight) is None and not isinstance(weight.format, Fp8):
            return self._reference.linear(x, weight)
        flat = self._rounded(x.reshape(-1, x.shape[-1]).contiguous())
        out = x.new_empty(flat.shape[0], weight.shape[0])
        if len(flat):
            self.launcher.start(linear_launch(flat, weight, out))
        return out.view(*x.shape[:-1], weight.shape[0])

    def _converted(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A plain weight in another dtype is cast to that of x one block of rows at a time, never as a
        whole."""
        step = max(1, DECODE_VALUES // weight.shape[1])
        return torch.cat([F.linear(x, part.to(x.dtype)) for part in torch.split(weight, step)], dim=-1)

    def linear_blocks(self, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        return blocks_by_products(self, x, weights)

    def moe(self, call: MoeCall) -> torch.Tensor:
        x, (tokens, top_k) = call.x, call.expert_ids.shape
        if tokens == 0:
            return torch.zeros_like(x)
        if call.extras != NO_EXTRAS:
            return moe_by_products(self, call)
        rounded = self._rounded(x)
        launches = moe_launches(replace(call, x=rounded), schedule(call.expert_ids, rounded.dtype))
        self.launcher.start(launches.gate_up)
        total, hidden = torch.empty_like(x), x.shape[1]
        step = max(MOST_OUTPUTS // (tokens * top_k) // COLUMNS, 1) * COLUMNS
        for first in range(0, hidden, step):
            last = min(first + step, hidden)
            out = x.new_empty(tokens, top_k, last - first, dtype=torch.float32)
            self.launcher.start(launches.down(out, first, last))
            total[:, first:last] = out.sum(1)
        return total

    def moe_apart(self, call: MoeCall) -> torch.Tensor:
        return apart_by_moe(self, call)

    def moe_some(self, call: MoeCall, some: torch.Tensor, out: torch.Tensor) -> None:
        some_apart(self, call, some, out)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return self._reference.rms_norm(x, weight, eps)  # one launch of torch's own

    def sinkhorn(self, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        n = logits.shape[-1]
        if n & (n - 1):  # not a power of two
            return self._reference.sinkhorn(logits, iterations, eps)
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if len(logits):
            self.launcher.start(sinkhorn_launch(logits.contiguous(), out, iterations, eps))
        return out

    def gather_rows(self, table: PackedTensor, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(rows), table.shape[1], device=self.device)
        if len(rows):
            self.launcher.start(gather_launch(table, rows.to(self.device), out))
        return out
