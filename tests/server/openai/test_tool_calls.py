"""Tool calls in answers. The tiny model calls no tools, so the engine's part is played by a script."""

from __future__ import annotations

from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from engine.chat.call_block import JsonCalls
from engine.chat.output_parser import TaggedParser
from engine.families.loader import Loaded, load
from engine.output import FinishReason
from server.openai.chat import ChatReply
from server.openai.requests import ChatRequest
from server.serving.answer import Answer
from server.serving.service import Served
from tests.server import scripted
from tests.server.harness import TINY
from tests.server.scripted import CALLS, Script


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
    choice: dict[str, Any]
    (choice,) = scripted.whole(reply(loaded, **fields), script)["choices"]
    return choice


def events(loaded: Loaded, script: Script) -> list[dict[str, Any]]:
    return scripted.events(reply(loaded, stream=True), script)


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


def test_tagged_calls_reach_openais_client_while_they_are_written(loaded: Loaded) -> None:
    subject = reply(loaded, stream=True)
    parser = TaggedParser(reasoning=False, in_reasoning=False, calls=JsonCalls())
    subject.answers = [Answer(0, parser, parallel_calls=True, end_of_reasoning=None)]
    arguments = '{"city": "Zürich", "days": [1, 2, 3]}'
    text = f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'

    chunks = [
        ChatCompletionChunk.model_validate(event) for event in scripted.events(subject, Script(text * 2))
    ]

    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(chunk)
    (choice,) = state.get_final_completion().choices
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", arguments)] * 2
    assert choice.finish_reason == "tool_calls"
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    assert sum(piece.index == 0 for piece in pieces) > 3


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
