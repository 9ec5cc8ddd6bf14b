"""Server-sent events, and answers that end when the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http.errors import ApiError, internal

log = logging.getLogger("loci")
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
# Proxies close silent connections, and clients give up on streams without events, while a long prompt takes
# minutes: an event that says nothing is sent after so many seconds.
KEEP_ALIVE_S = 15.0
PULSE_S = 0.5  # how often progress is looked for
OUTBOX_BYTES = 1 << 16  # of events that wait for a client to read
CLIENT_CLOSED_REQUEST = 499  # as proxies log it


def frame(data: dict[str, Any]) -> bytes:
    """One event; where its data has a `type`, that is also the event's name."""
    name = f"event: {data['type']}\n".encode() if "type" in data else b""
    return b"%bdata: %b\n\n" % (name, to_json(data))


def line(data: dict[str, Any]) -> bytes:
    """One line of JSON."""
    return to_json(data) + b"\n"


@dataclass(frozen=True)
class Framing:
    """How events are written one after the other."""

    media_type: str
    write: Callable[[dict[str, Any]], bytes]


EVENTS = Framing("text/event-stream", frame)
LINES = Framing("application/x-ndjson", line)
Pulse = Callable[[bool], dict[str, Any] | None]


class EventStream(Response):
    """Sends `events` as they come, then the bytes `last`; an error becomes the last event.

    `failure` builds the protocol's error event, `pulse` one to send while there is nothing else: it is told
    whether one is due, and has None where there is nothing to tell. `close` is called in any case: at the
    end, after an error, and when the client disconnects.
    """

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        last: bytes,
        failure: Callable[[ApiError], dict[str, Any]],
        pulse: Pulse,
        close: Callable[[], None],
        framing: Framing = EVENTS,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=framing.media_type)
        self._write = framing.write
        del self.headers["content-length"]
        self._events = events
        self._last = last
        self._failure = failure
        self._pulse = pulse
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(scope, send))
        finally:
            self._close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        outbox = _Outbox(self._wait)
        writing = asyncio.ensure_future(self._write_all(scope, outbox))
        try:
            while not outbox.is_complete:
                body = await outbox.take()
                await send({"type": "http.response.body", "body": body, "more_body": not outbox.is_complete})
        finally:
            outbox.close()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _wait(self, is_due: bool) -> bytes | None:
        event = self._pulse(is_due)
        return None if event is None else self._write(event)

    async def _write_all(self, scope: Scope, outbox: _Outbox) -> None:
        """Put all events into the outbox, and what the stream ends with."""
        try:
            async for event in self._events:
                await outbox.put(self._write(event))
            outbox.end(self._last)
        except ApiError as error:
            outbox.end(self._write(self._failure(error)))
        except Exception:
            request_id = scope["state"]["request_id"]
            log.exception("%s: a stream failed", request_id)
            outbox.end(self._write(self._failure(internal(request_id))))


class _Outbox:
    """Bytes on their way to the client: what is put in without waiting is taken out together.

    `is_complete` once nothing follows what was taken. Where nothing is put in, what `pulse` makes is.
    """

    def __init__(self, pulse: Callable[[bool], bytes | None]) -> None:
        self._pulse = pulse
        self.is_complete = False
        self._parts: list[bytes] = []
        self._nbytes = 0
        self._silent_s = 0.0
        self._has_ended = False
        self._filled, self._emptied = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._beat: asyncio.Handle = self._loop.call_soon(self._show_life)

    async def put(self, part: bytes) -> None:
        """Add bytes; waits only for a client that does not read."""
        while self._nbytes > OUTBOX_BYTES:
            self._emptied.clear()
            await self._emptied.wait()
        self._add(part)

    def end(self, part: bytes) -> None:
        """Add the last bytes."""
        self._has_ended = True
        self._add(part)

    async def take(self) -> bytes:
        """All bytes, once there are any."""
        await self._filled.wait()
        self._filled.clear()
        taken = b"".join(self._parts)
        self._parts.clear()
        self._nbytes = 0
        self._emptied.set()
        self.is_complete = self._has_ended
        return taken

    def close(self) -> None:
        """Nobody takes any more."""
        self._beat.cancel()

    def _add(self, part: bytes) -> None:
        self._parts.append(part)
        self._nbytes += len(part)
        self._silent_s = 0.0
        self._filled.set()

    def _show_life(self) -> None:
        if self._has_ended:
            return
        self._silent_s += PULSE_S
        event = self._pulse(self._silent_s >= KEEP_ALIVE_S)
        if event is not None:
            self._add(event)
        self._beat = self._loop.call_later(PULSE_S, self._show_life)


async def answer(request: Request, work: Coroutine[Any, Any, T], close: Callable[[], None]) -> T | Response:
    """The result of `work`, cancelled if the client disconnects. `close` is called in any case."""
    try:
        result = await unless_disconnected(request.receive, work)
    finally:
        close()
    return Response(status_code=CLIENT_CLOSED_REQUEST) if result is None else result


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the client disconnects first, which cancels it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
