"""The Triton back end: CUDA GPUs; and, for tests, any machine in Triton's interpreter.

Formats without a kernel here (GGUF) are decoded one block of rows at a time and multiplied by torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F

from quant.errors import ConfigError
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
    moe_by_products,
)
from quant.kernels.reference import DECODE_VALUES, ReferenceKernels
from quant.kernels.torch_layers import TorchLayers
from quant.packed import Format, PackedTensor


class TritonKernels(TorchLayers):
    """`Kernels` on one device; activations are float32 or bfloat16, results are of the same dtype.

    device    where `prepare` moves weights
    launcher  starts the kernels
    """

    name = "triton"

    def __init__(self, device: torch.device, launcher: Launcher | None = None) -> None:
        self.device = device
        self.launcher = launcher or Launcher()
        self._reference = ReferenceKernels()

    def describe(self) -> str:
        if self.device.type != "cuda":
            return f"Triton on {self.device}"
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"Triton on {torch.cuda.get_device_name(self.device)} (sm_{major}{minor})"

    def on(self, device: torch.device) -> TritonKernels:
        return self

    def multiplying(self, products: Products) -> AbstractContextManager[None]:
        if products != "exact":
            raise ConfigError(f"{products} products are for processors as yet; GPUs have exact ones")
        return nullcontext()

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
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = flat.new_empty(flat.shape[0], weight.shape[0])
        if len(flat):
            self.launcher.start(linear_launch(flat, weight, out))
        return out.view(*x.shape[:-1], weight.shape[0])

    def _converted(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A plain weight in another dtype is cast to that of x one block of rows at a time, never as a
        whole."""
        step = max(1, DECODE_VALUES // weight.shape[1])
        return torch.cat([F.linear(x, part.to(x.dtype)) for part in torch.split(weight, step)], dim=-1)

    def moe(self, call: MoeCall) -> torch.Tensor:
        x, (tokens, top_k) = call.x, call.expert_ids.shape
        if tokens == 0:
            return torch.zeros_like(x)
        if call.extras != NO_EXTRAS:
            return moe_by_products(self, call)
        out = x.new_empty(tokens * top_k, x.shape[1], dtype=torch.float32)
        plan = schedule(call.expert_ids, x.dtype)
        for launch in moe_launches(call, plan, out):
            self.launcher.start(launch)
        return out.view(tokens, top_k, -1).sum(1).to(x.dtype)

    def moe_apart(self, call: MoeCall) -> torch.Tensor:
        return apart_by_moe(self, call)

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
