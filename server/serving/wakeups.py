"""When the event loop looks at what the engine's thread has generated: often enough, and no oftener.

A fast model makes tokens faster than anybody can see them, and an event of a stream costs more than a token
of such a model. So tokens that come within an interval of each other are sent together. Nothing waits longer
than that, whatever the engine does next; what comes after a pause, a sequence's first token and its end do
not wait at all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress


class Wakeups:
    """Sets events of the running event loop for the engine's thread: all that are due together, at most once
    in `interval_s` seconds but for those that are due at once.

    The engine's thread calls `add` and `flush`; the rest runs on the event loop. Each side writes before it
    looks at what the other wrote, so nothing that is due is overlooked.
    """

    def __init__(self, interval_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval_s = interval_s
        self._due: deque[asyncio.Event] = deque()
        self._due_at_once: deque[asyncio.Event] = deque()
        self._is_called = False  # the loop is about to look
        self._is_resting = False  # the loop looks again when the interval is over

    def add(self, event: asyncio.Event, *, at_once: bool = False) -> None:
        """Have `event` set soon, or by the next `flush`."""
        (self._due_at_once if at_once else self._due).append(event)

    def flush(self) -> None:
        """Between two steps: wake the loop if anything is due now."""
        is_due = self._due_at_once or (self._due and not self._is_resting)
        if is_due and not self._is_called:
            self._is_called = True
            with suppress(RuntimeError):  # the loop has closed: nobody is left to read
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._is_called = False
        _set_all(self._due_at_once)
        if not self._is_resting:
            _set_all(self._due)
            if self._interval_s > 0:
                self._is_resting = True
                self._loop.call_later(self._interval_s, self._end_rest)

    def _end_rest(self) -> None:
        self._is_resting = False
        if self._due:
            self._look()


def _set_all(events: deque[asyncio.Event]) -> None:
    while events:
        events.popleft().set()
