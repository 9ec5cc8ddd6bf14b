"""Which kind of space each device has."""

from __future__ import annotations

import math
import mmap

import torch

from memory.pages.cuda_space import CudaSpace, page_bytes, pages_work
from memory.pages.space import HostSpace, Space, WholeSpace

WORTH_MAPPING = 1 << 16  # bytes


def is_paged(device: torch.device) -> bool:
    """Whether memory of a device is taken in pages."""
    return device.type == "cpu" or (device.type == "cuda" and pages_work(device))


def page_bytes_of(device: torch.device) -> int:
    """Bytes of a page of a device; 1 where all is allocated at once."""
    if not is_paged(device):
        return WholeSpace.page_bytes
    return mmap.PAGESIZE if device.type == "cpu" else page_bytes(device)


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros, all counted as taken. In host memory, pages that are never written cost none all the same."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < WORTH_MAPPING:
        return torch.zeros(shape, device=device, dtype=dtype)
    return HostSpace(nbytes).whole.view(dtype).view(shape)


def new_space(nbytes: int, device: torch.device) -> Space:
    """Addresses for so many bytes on a device. Raises BudgetError."""
    if not is_paged(device):
        return WholeSpace(nbytes, device)
    return HostSpace(nbytes) if device.type == "cpu" else CudaSpace(nbytes, device)
