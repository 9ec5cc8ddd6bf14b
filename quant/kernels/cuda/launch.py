"""Launches Triton kernels in one place, so that a test can see what would be launched and only compile it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments: tensors and numbers in order, then constants and launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[torch.Tensor | int | float, ...]
    constants: dict[str, int | bool]
    num_warps: int


class Launcher:
    """Starts kernels on the device of their first argument."""

    def start(self, launch: Launch) -> None:
        """Queue the kernel; returns before it has run."""
        first = launch.arguments[0]
        assert isinstance(first, torch.Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            launch.kernel[launch.grid](*launch.arguments, **launch.constants, num_warps=launch.num_warps)
