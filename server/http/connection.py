"""Connections: a client that is too slow to send its request or read its answer is disconnected."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMED_OUT = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: 47\r\nConnection: close\r\n\r\nthe head of the request did not arrive in time\n"
)


def protocol_with_deadlines(read_timeout_s: float, write_timeout_s: float) -> type[H11Protocol]:
    """uvicorn's protocol with two timeouts: the headers of a request must arrive within `read_timeout_s` of
    its start, and an answer that fills the connection's buffer must be read within `write_timeout_s`.

    uvicorn itself only limits the idle time between requests, which an occasional byte resets.
    """

    class DeadlineProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch(awaits_head=True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch(awaits_head=self.conn.their_state is h11.IDLE)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._patience = self.loop.call_later(write_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._patience is not None:
                self._patience.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._watch(awaits_head=False)
            if self._patience is not None:
                self._patience.cancel()
            super().connection_lost(exc)

        def _watch(self, *, awaits_head: bool) -> None:
            if awaits_head and self._deadline is None:
                self._deadline = self.loop.call_later(read_timeout_s, self._hang_up)
            elif not awaits_head and self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _hang_up(self) -> None:
            if not self.transport.is_closing():
                if self.conn.trailing_data[0]:
                    self.transport.write(TIMED_OUT)
                self.transport.close()

    return DeadlineProtocol


def allow_many_connections() -> None:
    """Raise this process's open-file limit to its maximum; every connection needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
