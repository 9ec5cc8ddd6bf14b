"""Sends looked-up rows to the GPU that needs them, on a separate stream.

One thread per GPU waits for lookups in the order of their requests and copies each as soon as it completes,
while earlier layers compute; compute waits only in the layer that needs the rows.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from memory.experts.copies import queue_of
from memory.telemetry import Telemetry
from memory.tiers import Tier


class FoundRows(Protocol):
    """A lookup in host memory."""

    def arrive(self) -> torch.Tensor:
        """The rows, `[n, dim]` float32, once they have arrived; raises the lookup's error."""
        ...


class SentRows:
    """Rows in flight to a GPU."""

    def __init__(self, sent: Future[None], rows: torch.Tensor, link: str, telemetry: Telemetry) -> None:
        self._sent = sent
        self._rows = rows
        self._link = link
        self._telemetry = telemetry

    @property
    def is_done(self) -> bool:
        return self._sent.done()

    def wait(self) -> torch.Tensor:
        """The rows on the GPU; waiting here counts as a stall. Raises the lookup's error."""
        if not self.is_done:
            start = time.perf_counter()
            try:
                self._sent.result()
            finally:
                self._telemetry.add("stalled_s", f"{self._link} demand", time.perf_counter() - start)
        self._sent.result()
        return self._rows


class RowSender:
    """Sends rows to one GPU. Used by one thread, which also launches the GPU's kernels."""

    def __init__(self, gpu: Tier, telemetry: Telemetry) -> None:
        self._device = gpu.device
        self._link = f"engram to {gpu.name}"
        self._telemetry = telemetry
        self._queue = queue_of(gpu.device)
        self._thread = ThreadPoolExecutor(1, f"loci-engram-{gpu.name}")

    def send(self, found: FoundRows, rows: int, dim: int) -> SentRows:
        """Copy a lookup's rows to the GPU once it has completed."""
        # Running kernels may still use this recycled memory: the copy waits for the fence.
        target = torch.empty(rows, dim, device=self._device)
        fence = self._queue.fence()

        def work() -> None:
            source = found.arrive()
            with torch.inference_mode(), self._queue.running(fence):
                target.copy_(source, non_blocking=True)
            self._telemetry.add("moved_bytes", self._link, target.nbytes)

        return SentRows(self._thread.submit(work), target, self._link, self._telemetry)

    def close(self) -> None:
        """Stop the thread; queued rows are not sent."""
        self._thread.shutdown(cancel_futures=True)
