"""Server-sent events, and answers that end when the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
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
CLIENT_CLOSED_REQUEST = 499  # as proxies log it


def frame(data: dict[str, Any]) -> bytes:
    """One event; where its data has a `type`, that is also the event's name."""
    name = f"event: {data['type']}\n".encode() if "type" in data else b""
    return b"%bdata: %b\n\n" % (name, to_json(data))


class EventStream(Response):
    """Sends `events` as they come, then the bytes `last`; an error becomes the last event.

    `failure` builds the protocol's error event, `pulse` one to send while there is nothing else: it is told
    whether one is due, and has None where there is nothing to tell. `close` is called in any case: at the end,
    after an error, and when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        last: bytes,
        failure: Callable[[ApiError], dict[str, Any]],
        pulse: Callable[[bool], dict[str, Any] | None],
        close: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
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

        silent_s = 0.0

        async def put(body: bytes) -> None:
            nonlocal silent_s
            silent_s = 0.0
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def keep_alive() -> None:
            nonlocal silent_s
            while True:
                await asyncio.sleep(min(PULSE_S, KEEP_ALIVE_S))
                silent_s += PULSE_S
                event = self._pulse(silent_s >= KEEP_ALIVE_S)
                if event is not None:
                    await put(frame(event))

        beat = asyncio.ensure_future(keep_alive())
        try:
            async for event in self._events:
                await put(frame(event))
            await put(self._last)
        except ApiError as error:
            await put(frame(self._failure(error)))
        except Exception:
            request_id = scope["state"]["request_id"]
            log.exception("%s: a stream failed", request_id)
            await put(frame(self._failure(internal(request_id))))
        finally:
            beat.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
