"""Links and transfer tickets: bytes in flight, and the one place where compute may wait for them.

A link is a worker thread with a priority queue: demand transfers overtake prefetches. A
link to a virtual GPU paces its copies to the speed of a real one; a disk link reads and repacks.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from memory.telemetry import Telemetry


class Priority(IntEnum):
    """Order on a link."""

    DEMAND = 0
    PREFETCH = 1


class CancelledError(Exception):
    """Raised by waiting for a cancelled transfer; a part that stops halfway reports how much it moved."""

    def __init__(self, message: str, moved_bytes: int = 0) -> None:
        super().__init__(message)
        self.moved_bytes = moved_bytes


class Ticket:
    """A pending transfer. `wait` returns when the bytes have arrived, or raises the transfer's error.

    stop is an event that running parts check to end early; None if they cannot.
    """

    def __init__(
        self, link: Link, nbytes: int, priority: Priority, parts: int, stop: threading.Event | None
    ) -> None:
        self._link = link
        self.nbytes = nbytes
        self.stop = stop
        self.label = f"{link.name} {priority.name.lower()}"
        self.parts_left = parts
        self._done = threading.Event()
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """True once `wait` would not block."""
        return self._done.is_set()

    @property
    def has_failed(self) -> bool:
        """True once the transfer has failed or was cancelled."""
        return self._done.is_set() and self.error is not None

    def wait(self) -> None:
        """Wait for the bytes; time spent here is the link's stall."""
        if not self._done.is_set():
            start = time.perf_counter()
            self._done.wait()
            self._link.telemetry.add("stalled_s", self.label, time.perf_counter() - start)
        if self.error is not None:
            raise self.error

    def end_part(self, error: BaseException | None) -> bool:
        """Called by the link, under its lock, when a part has ended; True if it was the last.

        A failed part does not end the transfer: others may still be writing to the same destination.
        """
        self.error = self.error or error
        self.parts_left -= 1
        return self.parts_left == 0

    def finish(self) -> None:
        """Called by the link when all parts have ended."""
        self._done.set()


@dataclass(order=True)
class _Job:
    priority: Priority
    number: int
    work: Callable[[], None] = field(compare=False)
    nbytes: int = field(compare=False)
    ticket: Ticket = field(compare=False)


class Link:
    """A transfer path with one queue and `workers` threads.

    bytes_per_s limits the link's speed (all workers together): after a transfer it stays busy for as long as
    the bytes would have taken. None: unlimited.
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
        self._under_way = 0
        self._busy_since = 0.0
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"loci-link-{name}-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        parts: Sequence[Callable[[], None]],
        nbytes: int,
        priority: Priority,
        stop: threading.Event | None = None,
    ) -> Ticket:
        """Queue a transfer of `nbytes` in total, done in `parts` of about equal size on the link's threads.

        stop: `cancel` sets it; running parts that check it then end early with CancelledError.
        """
        ticket = Ticket(self, nbytes, priority, len(parts), stop)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"link {self.name} is closed")
            for n, work in enumerate(parts):
                share = nbytes * (n + 1) // len(parts) - nbytes * n // len(parts)
                heapq.heappush(self._queue, _Job(priority, next(self._numbers), work, share, ticket))
            self._changed.notify(len(parts))
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Promote a queued prefetch to a demand transfer."""
        with self._changed:
            found = [job for job in self._queue if job.ticket is ticket]
            for job in found:
                job.priority = Priority.DEMAND
            if found:
                heapq.heapify(self._queue)

    def cancel(self, ticket: Ticket) -> bool:
        """Cancel a transfer: remove its queued parts and stop running ones that can be stopped.

        False if there are neither. The transfer ends with CancelledError once its running parts have ended,
        or at once if there are none.
        """
        with self._changed:
            kept = [job for job in self._queue if job.ticket is not ticket]
            queued = len(self._queue) - len(kept)
            can_stop = ticket.stop is not None and not ticket.stop.is_set() and ticket.parts_left > 0
            if queued == 0 and not can_stop:
                return False
            heapq.heapify(kept)
            self._queue = kept
            if ticket.stop is not None:
                ticket.stop.set()
            ticket.error = ticket.error or CancelledError(f"{ticket.label}: cancelled")
            ticket.parts_left -= queued
            if ticket.parts_left == 0:
                ticket.finish()
            return True

    def close(self) -> None:
        """Stop the threads; queued transfers fail."""
        with self._changed:
            self._closed = True
            dropped, self._queue = self._queue, []
            self._changed.notify_all()
        for job in dropped:
            self._end(job, RuntimeError(f"link {self.name} was closed"))
        for thread in self._threads:
            thread.join()

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                return None
            if self._under_way == 0:
                self._busy_since = time.perf_counter()
            self._under_way += 1
            return heapq.heappop(self._queue)

    @torch.inference_mode()  # the loading thread, which also writes slots, may be in that mode
    def _work(self) -> None:
        while (job := self._next()) is not None:
            error: BaseException | None = None
            try:
                started = time.perf_counter()
                job.work()
                self._pace(started, job.nbytes)
                self.telemetry.add("moved_bytes", self.name, job.nbytes)
            except CancelledError as stopped:
                self.telemetry.add("moved_bytes", self.name, stopped.moved_bytes)
                error = stopped
            except BaseException as raised:  # passed on to the waiter
                error = raised
            with self._changed:
                self._under_way -= 1
                now = time.perf_counter()
                self.telemetry.add("busy_s", self.name, now - self._busy_since)
                self._busy_since = now
            self._end(job, error)

    def _end(self, job: _Job, error: BaseException | None) -> None:
        ticket = job.ticket
        with self._changed:
            is_last = ticket.end_part(error)
        if is_last:
            if not isinstance(ticket.error, CancelledError):
                self.telemetry.add("failed" if ticket.error is not None else "moves", ticket.label)
            ticket.finish()

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
