"""Copies of experts between DRAM and one GPU, on their own stream, repacked on the GPU.

A link's thread calls `upload` and `download`, which return when the bytes are there: any kernel started from
then on sees them. The other way round, kernels that were started before may still read a slot that is to be
overwritten; a fence, taken when the transfer is asked for, says which, and the copy waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from memory.tiers import Tier
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
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
    """Copies experts between slots in DRAM and slots on one GPU; layouts are by layer."""

    def __init__(self, tier: Tier, in_dram: Sequence[SlotLayout], on_gpu: Sequence[SlotLayout]) -> None:
        self._queue = queue_of(tier.device)
        self._gpu_layouts: list[GpuSlotLayout] | None = None
        # Not where the host's kernels are plain torch, or the GPU is virtual: slots are the same then.
        if isinstance(in_dram[0], ExpertSlotLayout):
            layouts = [layout for layout in on_gpu if isinstance(layout, GpuSlotLayout)]
            self._gpu_layouts = layouts or None
        self._nbytes = [layout.nbytes for layout in in_dram]
        self._staging = torch.empty(
            max(self._nbytes) if self._gpu_layouts else 0, dtype=torch.uint8, device=tier.device
        )

    def fence(self) -> Fence:
        """Must be taken by the thread that launches kernels, when it requests a transfer."""
        return self._queue.fence()

    def upload(self, layer: int, slot: torch.Tensor, source: torch.Tensor, after: Fence) -> None:
        """Fill a slot of the GPU with an expert of `layer` from one in DRAM."""
        with self._queue.running(after):
            nbytes = self._nbytes[layer]
            if self._gpu_layouts is None:
                slot[:nbytes].copy_(source[:nbytes])
            else:
                staging = self._staging[:nbytes]
                staging.copy_(source[:nbytes], non_blocking=True)
                self._gpu_layouts[layer].from_panels(slot, staging)

    def download(self, layer: int, target: torch.Tensor, slot: torch.Tensor, after: Fence) -> None:
        """Fill a slot in DRAM with an expert of `layer` from one of the GPU."""
        with self._queue.running(after):
            nbytes = self._nbytes[layer]
            if self._gpu_layouts is None:
                target[:nbytes].copy_(slot[:nbytes])
            else:
                staging = self._staging[:nbytes]
                self._gpu_layouts[layer].to_panels(slot, staging)
                target[:nbytes].copy_(staging, non_blocking=True)
