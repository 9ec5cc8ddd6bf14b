"""Tools of chat completions that take text, and those that this server does not run. A script answers."""

from __future__ import annotations

import json
from typing import Any

import httpx

from engine.families.loader import load
from server.openai.chat import ChatReply
from server.openai.requests import ChatRequest
from server.serving.service import Served
from tests.server.harness import TINY
from tests.server.scripted import Script, events, whole

CUSTOM = {"type": "custom", "custom": {"name": "apply_patch", "description": "Edits."}}
CALL = (
    "<｜DSML｜ calls>\n"
    '<｜DSML｜ invoke name="apply_patch">\n'
    '<｜DSML｜ parameter name="input" string="true">a\n"b"</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n'
    "</｜DSML｜ calls>"
)


def request(**fields: Any) -> ChatRequest:
    say = [{"role": "user", "content": "Hi"}]
    return ChatRequest.model_validate(
        {"messages": say, "reasoning_effort": "none", "tools": [CUSTOM]} | fields
    )


def test_calls_of_tools_that_take_text_have_text() -> None:
    loaded = load(TINY)
    assert loaded.chat is not None
    prompt = loaded.chat.render(request().as_prompt())

    def reply() -> ChatReply:
        return ChatReply(request(), prompt, Served("m", loaded, engine=None))  # type: ignore[arg-type]

    (choice,) = whole(reply(), Script(CALL))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["custom"]) == ("custom", {"name": "apply_patch", "input": 'a\n"b"'})
    deltas = [event["choices"][0]["delta"] for event in events(reply(), Script(CALL))]
    (streamed,) = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    assert streamed["index"] == 0
    assert streamed["custom"] == call["custom"]


def test_such_calls_of_the_history_are_those_of_functions() -> None:
    call = {"id": "a", "type": "custom", "custom": {"name": "apply_patch", "input": "x"}}
    body = request(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}])

    (kept,) = body.messages[1].tool_calls or []
    assert json.loads(kept.function.arguments) == {"input": "x"}


def test_such_a_tool_can_be_chosen() -> None:
    body = request(tool_choice={"type": "custom", "custom": {"name": "apply_patch"}})

    assert body.as_prompt()["tool_choice"]["function"]["name"] == "apply_patch"


def test_a_header_says_what_the_model_is_not_shown(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        "tools": [{"type": "web_search"}],
    }

    answer = http.post("/v1/chat/completions", json=body)

    assert (answer.status_code, answer.headers["X-Ignored-Tools"]) == (200, "web_search")
