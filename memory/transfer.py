"""Links and tickets: bytes on their way, and the one place where compute may wait for them.

A link is a worker thread with a priority queue: what is needed now overtakes what is only foreseen. A
link to a virtual card paces its copies to the speed of a real one; a disk link reads and rearranges.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from memory.telemetry import Telemetry


class Priority(IntEnum):
    """Order on a link."""

    DEMAND = 0
    PREFETCH = 1


class Ticket:
    """The promise of a transfer. `wait` returns when the bytes are there, or raises what went wrong."""

    def __init__(self, link: Link, nbytes: int) -> None:
        self._link = link
        self.nbytes = nbytes
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """True once `wait` would not wait."""
        return self._done.is_set()

    @property
    def has_failed(self) -> bool:
        """True once it is known that the bytes will not come."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the bytes; time spent here is the link's stall."""
        if not self._done.is_set():
            start = time.perf_counter()
            self._done.wait()
            self._link.telemetry.add("stalled_s", self._link.name, time.perf_counter() - start)
        if self._error is not None:
            raise self._error

    def finish(self, error: BaseException | None = None) -> None:
        """Called by the link when the transfer has ended."""
        self._error = error
        self._done.set()


@dataclass(order=True)
class _Job:
    priority: Priority
    number: int
    work: Callable[[], None] = field(compare=False)
    ticket: Ticket = field(compare=False)


class Link:
    """A transfer path with `workers` threads working off one queue.

    bytes_per_s paces the link to a speed (all workers together): after a transfer it stays busy for
    as long as the bytes would have taken. None: no pacing.
    """

    def __init__(
        self, name: str, telemetry: Telemetry, *, bytes_per_s: float | None = None, workers: int = 1
    ) -> None:
        self.name = name
        self.telemetry = telemetry
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._numbers = itertools.count()
        self._queue: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"loci-link-{name}-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None], nbytes: int, priority: Priority) -> Ticket:
        """Queue `work`, which moves `nbytes`; it runs on one of the link's threads."""
        ticket = Ticket(self, nbytes)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"link {self.name} is closed")
            heapq.heappush(self._queue, _Job(priority, next(self._numbers), work, ticket))
            self._changed.notify()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Let a queued transfer that was only foreseen go first: it is needed now."""
        with self._changed:
            for job in self._queue:
                if job.ticket is ticket and job.priority is not Priority.DEMAND:
                    job.priority = Priority.DEMAND
                    heapq.heapify(self._queue)
                    return

    def close(self) -> None:
        """End the threads; what is still queued fails."""
        with self._changed:
            self._closed = True
            dropped, self._queue = self._queue, []
            self._changed.notify_all()
        for job in dropped:
            job.ticket.finish(RuntimeError(f"link {self.name} was closed"))
        for thread in self._threads:
            thread.join()

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            return heapq.heappop(self._queue) if self._queue else None

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                started = time.perf_counter()
                job.work()
                self._pace(started, job.ticket.nbytes)
            except BaseException as error:  # handed to whoever waits
                job.ticket.finish(error)
                continue
            self.telemetry.add("moved_bytes", self.name, job.ticket.nbytes)
            self.telemetry.add("moves", f"{self.name} {job.priority.name.lower()}")
            job.ticket.finish()

    def _pace(self, started: float, nbytes: int) -> None:
        """Hold the link until the bytes would have arrived at its speed."""
        if self._bytes_per_s is None:
            return
        with self._changed:
            self._free_at = max(self._free_at, started) + nbytes / self._bytes_per_s
            until = self._free_at
        delay = until - time.perf_counter()
        if delay > 0:
            time.sleep(delay)
