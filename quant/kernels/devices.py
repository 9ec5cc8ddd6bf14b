"""One back end for a machine with GPUs: each weight meets the kernels of the device that it lies on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quant.kernels.interface import Kernels, MoeCall, SlotLayout, Weight
from quant.packed import Format, PackedTensor


class DeviceKernels:
    """`Kernels` that computes where the weights lie; activations must lie there too.

    host   for weights in host memory, whose operations that take no weight run there, too
    gpus  one back end for each GPU
    """

    name = "gpus"

    def __init__(self, host: Kernels, gpus: Mapping[torch.device, Kernels]) -> None:
        self._host = host
        self._gpus = dict(gpus)

    def describe(self) -> str:
        return "; ".join(kernels.describe() for kernels in (self._host, *self._gpus.values()))

    def on(self, device: torch.device) -> Kernels:
        return self._gpus.get(device, self._host)

    def prepare(self, weight: Weight) -> Weight:
        return self._host.prepare(weight)

    def slot_layout(self, hidden: int, width: int, format_: Format) -> SlotLayout:
        return self._host.slot_layout(hidden, width, format_)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        return self.on(_device_of(weight)).linear(x, weight)

    def moe(self, call: MoeCall) -> torch.Tensor:
        return self.on(call.x.device).moe(call)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return self.on(x.device).rms_norm(x, weight, eps)

    def sinkhorn(self, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        return self.on(logits.device).sinkhorn(logits, iterations, eps)

    def gather_rows(self, table: PackedTensor, rows: torch.Tensor) -> torch.Tensor:
        return self.on(_device_of(table)).gather_rows(table, rows)


def _device_of(weight: Weight) -> torch.device:
    return weight.device if isinstance(weight, torch.Tensor) else weight.codes.device
