"""Triton's kernels on GPUs in name only: in the interpreter, on the numbers behind the label."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.launch import Launch, Launcher
from quant.kernels.interface import MoeCall, Weight
from quant.packed import PackedTensor
from tests.pretend_gpus import OnGpu

_one_at_a_time = threading.Lock()  # the interpreter keeps the program's number in one place


class PretendLauncher(Launcher):
    """Runs kernels in the interpreter; counts them."""

    def __init__(self) -> None:
        self.started = 0

    def start(self, launch: Launch) -> None:
        arguments = tuple(a.held if isinstance(a, OnGpu) else a for a in launch.arguments)
        with _one_at_a_time:
            self.started += 1
            super().start(replace(launch, arguments=arguments))


class InterpretedGpu(TritonKernels):
    """Records programs of Triton's kernels; what is not recorded, prompts, is computed in plain torch."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, PretendLauncher())

    def prepare(self, weight: Weight) -> Weight:
        if isinstance(weight, torch.Tensor):
            return weight.to(self.device)
        scales = None if weight.scales is None else weight.scales.to(self.device)
        return PackedTensor(weight.format, weight.shape, weight.codes.to(self.device), scales)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        return self._reference.linear(x, weight)

    def moe(self, call: MoeCall) -> torch.Tensor:
        return self._reference.moe(call)

    def sinkhorn(self, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        return self._reference.sinkhorn(logits, iterations, eps)
