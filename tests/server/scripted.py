"""Replies whose engine is played by a script: the tiny model calls no tools and closes no reasoning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from engine.output import FinishReason, Output
from server.serving.reply import Reply

CALLS = (
    "Let me look.\n\n<｜DSML｜ calls>\n"
    '<｜DSML｜ invoke name="weather">\n'
    '<｜DSML｜ parameter name="city" string="true">Paris</｜DSML｜ parameter>\n'
    "</｜DSML｜ invoke>\n"
    '<｜DSML｜ invoke name="time">\n'
    '<｜DSML｜ parameter name="zone" string="false">1</｜DSML｜ parameter>\n'
    "</｜DSML｜ invoke>\n"
    "</｜DSML｜ calls>"
)


class Script:
    """Stands for a Generation whose only sequence writes `text`, piece by piece."""

    def __init__(
        self, text: str, reason: FinishReason = FinishReason.STOP, stop_match: str | None = None
    ) -> None:
        self._text = text
        self._last = Output(finish_reason=reason, stop_match=stop_match)

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        for start in range(0, len(self._text), 7):
            yield 0, Output(self._text[start : start + 7], token_ids=(5,))
        yield 0, self._last


def whole(reply: Reply, script: Script) -> dict[str, Any]:
    """The finished answer."""
    return asyncio.run(reply.whole(script))  # type: ignore[arg-type]


def events(reply: Reply, script: Script) -> list[dict[str, Any]]:
    """The answer as events."""

    async def collect() -> list[dict[str, Any]]:
        return [event async for event in reply.events(script)]  # type: ignore[arg-type]

    return asyncio.run(collect())
