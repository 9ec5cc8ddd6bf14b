"""A GPU's program that computes its share of another GPU's layers, beside whatever else its own GPU does.

It waits for the other's words and answers them (mailbox.py). On a CUDA device whose streams can do that, it
is started once a step, on a stream of its own, and nobody takes part any further. Elsewhere a thread runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from quant.kernels.cuda.mailbox import PAUSE_S
from quant.kernels.cuda.program import GpuProgram


class Helper:
    """Runs a program of `GpuRecorder.serve`, once a step. Used by one thread at a time."""

    def __init__(self, program: GpuProgram) -> None:
        self.program = program
        self.device = program.device
        is_cuda = self.device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if is_cuda:
            # torch hands out 32 streams a device in turn. One of usual priority could be that on which the
            # processor's answer is computed, behind what waits for that very answer here.
            self._stream = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        self._is_done: Callable[[], bool] = lambda: True
        self._pool: ThreadPoolExecutor | None = None
        if not (is_cuda and program.runs_alone):
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"loci-helper-{self.device}")

    def start(self, rows: int, on_failure: Callable[[BaseException], None]) -> None:
        """Serve a step of so many rows; `on_failure` hears, perhaps on another thread, of what goes wrong."""
        if self._stream is not None:  # after what the GPU was given before: experts that have moved
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        if self._pool is None:
            self._run(rows)
            assert self._stream is not None
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._is_done = event.query
            return

        def told(future: Future[None]) -> None:
            error = future.exception()
            if error is not None:
                on_failure(error)

        future = self._pool.submit(self._run, rows)
        future.add_done_callback(told)
        self._is_done = future.done

    def is_done(self) -> bool:
        """Whether the step that was started last is served. Raises RuntimeError where its GPU has failed."""
        return self._is_done()

    @torch.inference_mode()
    def _run(self, rows: int) -> None:
        if self._stream is None:
            self.program.start(rows)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self.program.start(rows)
            if self._pool is not None:
                self._stream.synchronize()


def reached(device: torch.device) -> Callable[[], bool]:
    """Says whether a device has done what its current stream was given until now; raises RuntimeError if it
    has failed."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    query: Callable[[], bool] = event.query
    return query


def comes_true(is_done: Callable[[], bool], seconds: float) -> bool:
    """Wait for something, not longer than this; whether it has come."""
    until = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > until:
            return False
        time.sleep(PAUSE_S)
    return True
