"""A measuring client: streams of completions over plain connections, light enough to share the machine."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from engine.bench_engine import Timeline
from quant.errors import LociError

DONE = b"[DONE]"
MAX_LINE_BYTES = 1 << 20


class Target:
    """A server to ask, and the name of its model. `url` is its root, as `http://127.0.0.1:8000`."""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise LociError(f"{url} is not an address; expected something like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.model = model
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.path = f"{parts.path.rstrip('/')}/v1/completions"
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.headers = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        if api_key:
            self.headers += f"Authorization: Bearer {api_key}\r\n"


async def stream_completion(
    target: Target, fields: Mapping[str, Any], timeline: Timeline | None = None
) -> Timeline:
    """Ask for a completion and read it to its end. Raises LociError for whatever is not an answer.

    A `timeline` that is passed in can be watched while it grows.
    """
    body = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}, **fields}
    payload = json.dumps(body).encode()
    head = f"POST {target.path} HTTP/1.1\r\n{target.headers}Content-Length: {len(payload)}\r\n"
    timeline = timeline or Timeline()
    timeline.sent_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(
        target.host, target.port, ssl=target.tls, limit=MAX_LINE_BYTES
    )
    try:
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + payload)
        async for event in _events(reader):
            now = time.perf_counter()
            if event == DONE:
                return timeline
            _note(timeline, json.loads(event), now)
        raise LociError(f"{target.url}: the stream ended before it was complete")
    finally:
        writer.close()


def _note(timeline: Timeline, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        raise LociError(f"the server says: {chunk['error']['message']}")
    for choice in chunk["choices"]:
        timeline.arrivals_s.append(now)
        timeline.finish_reason = choice["finish_reason"]
    if chunk.get("usage"):
        timeline.tokens = chunk["usage"]["completion_tokens"]


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event of a chunked answer."""
    status = (await reader.readline()).split(b" ", 2)
    headers = await reader.readuntil(b"\r\n\r\n")
    if len(status) < 2 or status[1] != b"200":
        text = (await reader.read()).decode(errors="replace")
        raise LociError(
            f"the server answers {b' '.join(status[1:]).decode(errors='replace').strip()}: {text}"
        )
    if b"chunked" not in headers.lower():
        raise LociError("the server does not stream: its answer is not chunked")
    buffer = b""
    while size := int(await reader.readline(), 16):
        buffer += (await reader.readexactly(size + 2))[:size]
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")
