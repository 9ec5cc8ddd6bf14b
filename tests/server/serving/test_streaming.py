"""What a stream sends while nothing happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.serving import streaming
from server.serving.streaming import DONE, OUTBOX_BYTES, EventStream, frame

WAITING = {"type": "ping"}


def pulse(is_due: bool) -> dict[str, Any] | None:
    return WAITING if is_due else None


def test_a_silent_stream_shows_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.02)
    monkeypatch.setattr(streaming, "PULSE_S", 0.01)
    sent: list[bytes] = []

    async def run() -> None:
        two_signs = asyncio.Event()

        async def events() -> AsyncIterator[dict[str, Any]]:
            yield {"n": 1}
            await two_signs.wait()
            yield {"n": 2}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if sent.count(frame(WAITING)) == 2:
                two_signs.set()

        async def receive() -> Any:
            await asyncio.Event().wait()

        stream = EventStream(events(), DONE, lambda error: error.body, pulse, lambda: None)
        await asyncio.wait_for(stream({"type": "http"}, receive, send), timeout=30)

    asyncio.run(run())

    assert sent[1] == frame({"n": 1})
    assert sent[2:4] == [frame(WAITING), frame(WAITING)]
    assert sent[-1] == frame({"n": 2}) + DONE


def test_events_that_are_ready_together_are_sent_in_one_piece() -> None:
    sent: list[bytes] = []

    async def run() -> None:
        async def events() -> AsyncIterator[dict[str, Any]]:
            for n in range(3):
                yield {"n": n}
            await asyncio.sleep(0.01)
            yield {"n": 3}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        async def receive() -> Any:
            await asyncio.Event().wait()

        stream = EventStream(events(), DONE, lambda error: error.body, pulse, lambda: None)
        await asyncio.wait_for(stream({"type": "http"}, receive, send), timeout=30)

    asyncio.run(run())

    assert sent[1:] == [b"".join(frame({"n": n}) for n in range(3)), frame({"n": 3}) + DONE]


def test_events_for_a_client_that_does_not_read_are_not_made() -> None:
    made = 0

    async def run() -> None:
        async def events() -> AsyncIterator[dict[str, Any]]:
            nonlocal made
            while True:
                made += 1
                yield {"text": "x" * (OUTBOX_BYTES // 4)}

        async def send(message: Any) -> None:
            if "body" in message:
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}

        stream = EventStream(events(), DONE, lambda error: error.body, pulse, lambda: None)
        await asyncio.wait_for(stream({"type": "http"}, receive, send), timeout=30)

    asyncio.run(run())

    assert made < 16
