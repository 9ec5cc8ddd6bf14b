"""Copies of experts between DRAM and one GPU, on their own stream, repacked on the GPU.

A link's thread calls `upload` and `download`, which return when the bytes are there: any kernel started from
then on sees them. The other way round, kernels that were started before may still read a slot that is to be
overwritten; a fence, taken when the transfer is asked for, says which, and the copy waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from memory.tiers import Tier
from quant.kernels.cpu.panels import ExpertSlotLayout
from quant.kernels.cuda.slots import GpuSlotLayout
from quant.kernels.interface import SlotLayout

Fence = object


class CopyQueue(Protocol):
    """Ordering between copies and compute on a device."""

    def fence(self) -> Fence:
        """A fence after everything launched on the device so far."""
        ...

    def running(self, after: Fence) -> AbstractContextManager[None]:
        """Work launched in the block starts after the fence and is complete when the block ends."""
        ...


class HostQueue:
    """Host memory, also of virtual GPUs: every call is synchronous."""

    def fence(self) -> Fence:
        return None

    @contextmanager
    def running(self, after: Fence) -> Iterator[None]:
        yield


class CudaQueue:
    """A CUDA GPU: a copy stream next to the compute stream, synchronised by events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fence(self) -> Fence:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def running(self, after: Fence) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            assert isinstance(after, torch.cuda.Event)
            self._stream.wait_event(after)
            try:
                yield
            finally:  # also after a failure: no copy to a slot that is given away may be in flight
                self._stream.synchronize()


def queue_of(device: torch.device) -> CopyQueue:
    """A new queue of copies to and from a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue()


class SlotCopier:
    """Copies experts between slots in DRAM and slots on one GPU."""

    def __init__(self, tier: Tier, in_dram: SlotLayout, on_gpu: SlotLayout) -> None:
        self._queue = queue_of(tier.device)
        in_panels = isinstance(in_dram, ExpertSlotLayout)  # not where the host's kernels are plain torch
        self._gpu_layout = on_gpu if in_panels and isinstance(on_gpu, GpuSlotLayout) else None
        self._staging = None
        if self._gpu_layout is not None:
            self._staging = torch.empty(in_dram.nbytes, dtype=torch.uint8, device=tier.device)

    def fence(self) -> Fence:
        """Must be taken by the thread that launches kernels, when it requests a transfer."""
        return self._queue.fence()

    def upload(self, slot: torch.Tensor, source: torch.Tensor, after: Fence) -> None:
        """Fill a slot of the GPU from one in DRAM."""
        with self._queue.running(after):
            if self._gpu_layout is None or self._staging is None:
                slot.copy_(source)
            else:
                self._staging.copy_(source, non_blocking=True)
                self._gpu_layout.from_panels(slot, self._staging)

    def download(self, target: torch.Tensor, slot: torch.Tensor, after: Fence) -> None:
        """Fill a slot in DRAM from one of the GPU."""
        with self._queue.running(after):
            if self._gpu_layout is None or self._staging is None:
                target.copy_(slot)
            else:
                self._gpu_layout.to_panels(slot, self._staging)
                target.copy_(self._staging, non_blocking=True)
