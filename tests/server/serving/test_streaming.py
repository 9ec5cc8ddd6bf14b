"""What a stream sends while nothing happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.serving import streaming
from server.serving.streaming import DONE, EventStream, frame


WAITING = {"type": "ping"}


def test_a_silent_stream_shows_that_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.01)
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

        def pulse(is_due: bool) -> dict[str, Any] | None:
            return WAITING if is_due else None

        stream = EventStream(events(), DONE, lambda error: error.body, pulse, lambda: None)
        await asyncio.wait_for(stream({"type": "http"}, receive, send), timeout=30)

    asyncio.run(run())

    assert sent[1] == frame({"n": 1})
    assert sent[2:4] == [frame(WAITING), frame(WAITING)]
    assert sent[-3:] == [frame({"n": 2}), DONE, b""]
