"""Files that many threads write at once, and that are read back before anybody uses them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from memory.convert.units import Written, is_intact
from memory.hardware.detect import usable_cores
from quant.errors import CheckpointError

Result = TypeVar("Result")


@contextmanager
def worker_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone: work is spread over units, not inside torch's operations."""
    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "convert", initializer=lambda: torch.set_num_threads(1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)


@contextmanager
def verified_file(
    part: Path, header: bytes, nbytes: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[Written]]]:
    """The new file `part` of `nbytes` bytes, open, with its header; and a list for all that is written there.

    Read back at the end: raises CheckpointError where it is not what was written.
    """
    written: list[Written] = []
    with part.open("wb+") as file:
        output = file.fileno()
        os.truncate(output, nbytes)
        file.write(header)
        file.flush()
        yield output, written
        os.fsync(output)
        # What is read back must come from the disk, not from the page cache.
        os.posix_fadvise(output, 0, 0, os.POSIX_FADV_DONTNEED)
        intact = pool.map(partial(is_intact, output), written)
        if os.pread(output, len(header), 0) != header or not all(intact):
            raise CheckpointError(f"{part}: reads back differently from what was written; check the disk")


def in_parallel(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Results of jobs as they are done, a bounded number at a time; none runs any more behind the end."""
    waiting = iter(jobs)
    running: set[Future[Result]] = set()
    window = 4 * usable_cores()
    try:
        while True:
            for job in waiting:
                running.add(pool.submit(job))
                if len(running) >= window:
                    break
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        # A file may be about to be closed: nothing may still be writing to it.
        for future in running:
            future.cancel()
        wait(running)
