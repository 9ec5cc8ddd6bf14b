"""What calls into the library have in common."""

from __future__ import annotations

import ctypes

import torch


class NativeCalls:
    """Calls the library; what implements it knows a level and a number of threads."""

    _library: ctypes.CDLL
    _level: int

    def _threads(self) -> int:
        raise NotImplementedError


def floats(x: torch.Tensor) -> torch.Tensor:
    """x as contiguous float32: unchanged if it already is, because torch calls take time."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
