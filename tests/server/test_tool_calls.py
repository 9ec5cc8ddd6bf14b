"""Tool calls in answers. The tiny model calls no tools, so the engine's part is played by a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.generation import FinishReason, Output
from engine.loader import Loaded, load
from server.chat import ChatReply
from server.openai_types import ChatRequest
from server.service import Served
from tests.server.harness import TINY

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

    def __init__(self, text: str, reason: FinishReason = FinishReason.STOP) -> None:
        self._text = text
        self._reason = reason

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        for start in range(0, len(self._text), 7):
            yield 0, Output(self._text[start : start + 7], token_ids=(5,))
        yield 0, Output(finish_reason=self._reason)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(TINY)


def reply(loaded: Loaded, **fields: Any) -> ChatReply:
    function = {"parameters": {"type": "object", "properties": {}}}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "reasoning_effort": "none",
        "tools": [{"type": "function", "function": {"name": n} | function} for n in ("weather", "time")],
    }
    request = ChatRequest.model_validate(body | fields)
    assert loaded.chat is not None
    served = Served("m", loaded, engine=None)  # type: ignore[arg-type]  # nothing is submitted
    return ChatReply(request, loaded.chat.render(request.as_prompt()), served)


def whole(loaded: Loaded, script: Script, **fields: Any) -> dict[str, Any]:
    answer = asyncio.run(reply(loaded, **fields).whole(script))  # type: ignore[arg-type]
    (choice,) = answer["choices"]
    return choice


def events(loaded: Loaded, script: Script) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [event async for event in reply(loaded, stream=True).events(script)]  # type: ignore[arg-type]

    return asyncio.run(collect())


def test_calls_become_tool_calls_with_json_arguments(loaded: Loaded) -> None:
    choice = whole(loaded, Script(CALLS))

    weather, time = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    assert weather["type"] == "function"
    assert weather["function"]["name"] == "weather"
    assert weather["function"]["arguments"].replace(" ", "") == '{"city":"Paris"}'
    assert time["function"]["arguments"].replace(" ", "") == '{"zone":1}'
    assert weather["id"] != time["id"]


def test_streamed_calls_add_up_to_the_whole_ones(loaded: Loaded) -> None:
    expected = whole(loaded, Script(CALLS))["message"]["tool_calls"]

    calls: dict[int, dict[str, Any]] = {}
    for event in events(loaded, Script(CALLS)):
        for piece in event["choices"][0]["delta"].get("tool_calls", ()):
            call = calls.setdefault(piece["index"], piece | {"function": {"arguments": ""}})
            call["function"]["name"] = piece["function"].get("name", call["function"].get("name"))
            call["function"]["arguments"] += piece["function"]["arguments"]

    assert [call["function"] for call in calls.values()] == [call["function"] for call in expected]
    assert all(call["id"] and call["type"] == "function" for call in calls.values())
    assert events(loaded, Script(CALLS))[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_parallel_calls_only_the_first_is_made(loaded: Loaded) -> None:
    choice = whole(loaded, Script(CALLS), parallel_tool_calls=False)

    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert choice["finish_reason"] == "tool_calls"


def test_an_answer_cut_off_inside_a_call_says_so(loaded: Loaded) -> None:
    assert whole(loaded, Script(CALLS[:-40], FinishReason.LENGTH))["finish_reason"] == "length"


def test_an_answer_without_calls_simply_stops(loaded: Loaded) -> None:
    choice = whole(loaded, Script("It rains."))

    assert choice["message"] == {"role": "assistant", "content": "It rains."}
    assert choice["finish_reason"] == "stop"
