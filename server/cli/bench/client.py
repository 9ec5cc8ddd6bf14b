"""A measuring client: streams of completions over plain connections, light enough to share the machine."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import h11

from engine.bench.streams import Timeline
from quant.errors import LociError

DONE = b"[DONE]"


class Target:
    """A server to ask, and the name of its model. `url` is its root, as `http://127.0.0.1:8000`."""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise LociError(f"{url} is not a URL; expected something like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.model = model
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.path = f"{parts.path.rstrip('/')}/v1/completions"
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.headers = [("Host", parts.netloc), ("Content-Type", "application/json"), ("Connection", "close")]
        if api_key:
            self.headers.append(("Authorization", f"Bearer {api_key}"))


class CompletionStream(asyncio.Protocol):
    """One answer as it is received, on a connection of its own.

    What arrives is only noted with its time, and read when somebody looks at the timeline: client and
    server share the machine, and what the client computes in between is taken from the server.
    """

    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self._received: list[tuple[float, bytes]] = []
        self._connection = h11.Connection(h11.CLIENT)
        self._text = b""
        self._status = 0
        self._timeline = Timeline()
        self._is_complete = False

    def request(self, target: Target, fields: Mapping[str, Any]) -> bytes:
        """The bytes that ask for a completion."""
        body = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}, **fields}
        payload = json.dumps(body).encode()
        headers = [*target.headers, ("Content-Length", str(len(payload)))]
        head = h11.Request(method="POST", target=target.path, headers=headers)
        parts = [self._connection.send(part) for part in (head, h11.Data(data=payload), h11.EndOfMessage())]
        return b"".join(part or b"" for part in parts)

    def send(self, request: bytes) -> None:
        """Send the request; the clock starts here, as clients keep their connections open."""
        assert self.transport is not None
        self._timeline.sent_s = time.perf_counter()
        self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def timeline(self) -> Timeline:
        """What has arrived so far. Raises LociError for whatever is not an answer."""
        received, self._received = self._received, []
        try:
            for now, data in received:
                self._connection.receive_data(data)
                self._read(now)
        except h11.RemoteProtocolError as error:
            raise LociError(f"the server's answer is not HTTP: {error}") from None
        return self._timeline

    def check_complete(self) -> None:
        """Raise LociError where the connection ended before the answer did."""
        if self._status != 200:
            text = self._text.decode(errors="replace")
            raise LociError(f"the server answered {self._status or 'nothing'}: {text}")
        if not self._is_complete:
            raise LociError("the stream ended before it was complete")

    def _read(self, now: float) -> None:
        while True:
            event = self._connection.next_event()
            match event:
                case h11.Response():
                    self._status = event.status_code
                    if self._status == 200 and b"event-stream" not in dict(event.headers).get(
                        b"content-type", b""
                    ):
                        raise LociError("the server does not stream: its response is not an event stream")
                case h11.Data():
                    self._text += event.data
                    if self._status == 200:
                        *events, self._text = self._text.split(b"\n\n")
                        for each in events:
                            self._note(each.removeprefix(b"data: "), now)
                case _:
                    return

    def _note(self, event: bytes, now: float) -> None:
        if event.startswith(b":"):  # a comment, to keep the connection alive
            return
        if event == DONE:
            self._is_complete = True
            return
        chunk = json.loads(event)
        if "error" in chunk:
            raise LociError(f"the server reports: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            self._timeline.arrivals_s.append(now)
            self._timeline.finish_reason = choice["finish_reason"]
        if chunk.get("usage"):
            self._timeline.tokens = chunk["usage"]["completion_tokens"]


async def stream_completion(
    target: Target, fields: Mapping[str, Any], stream: CompletionStream | None = None
) -> Timeline:
    """Ask for a completion and read it to its end. Raises LociError for whatever is not an answer.

    A `stream` that is passed in can be watched while it grows.
    """
    (timeline,) = await stream_completions(target, [fields], [stream or CompletionStream()])
    return timeline


async def stream_completions(
    target: Target, requests: Sequence[Mapping[str, Any]], streams: Sequence[CompletionStream] | None = None
) -> list[Timeline]:
    """Ask for completions all at once, and read them when all have ended. Raises LociError for whatever is
    not an answer."""
    streams = streams or [CompletionStream() for _ in requests]
    loop = asyncio.get_running_loop()
    try:
        for stream in streams:
            await loop.create_connection(lambda s=stream: s, target.host, target.port, ssl=target.tls)
        encoded = [stream.request(target, fields) for stream, fields in zip(streams, requests, strict=True)]
        for stream, request in zip(streams, encoded, strict=True):
            stream.send(request)
        for stream in streams:
            await stream.ended
        timelines = [stream.timeline for stream in streams]
        for stream in streams:
            stream.check_complete()
    except LociError as error:
        raise LociError(f"{target.url}: {error}") from None
    finally:
        for stream in streams:
            if stream.transport is not None:
                stream.transport.close()
    return timelines
