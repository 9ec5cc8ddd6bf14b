"""Tools that the vendor's models know by type, images in results, and reasoning that is not to be shown."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.families.loader import Loaded, load
from server.anthropic.reply import MessagesReply
from server.anthropic.requests import MessagesRequest
from server.serving.service import Served
from tests.server.harness import TINY
from tests.server.scripted import Script, events, whole

SAY = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(TINY)


def request(**fields: Any) -> MessagesRequest:
    return MessagesRequest.model_validate({"max_tokens": 5, "messages": SAY} | fields)


def test_tools_that_clients_run_are_described_and_others_left_out() -> None:
    types = ("bash_20250124", "web_search_20260209", "text_editor_20250728", "mcp_toolset")
    body = request(tools=[{"type": kind, "name": kind[:4]} for kind in types])

    bash, editor = (tool.function for tool in body.as_chat().tools or [])
    assert bash.name == "bash"
    assert "restart" in (bash.parameters or {})["properties"]
    assert (editor.parameters or {})["properties"]["command"]["enum"][0] == "view"
    assert body.ignored_tools == ["web_search_20260209", "mcp_toolset"]


def test_a_header_says_what_the_model_is_not_shown(http: httpx.Client) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    body = {"max_tokens": 2, "messages": SAY, "tools": tools}

    answer = http.post("/v1/messages", json=body)
    forced = http.post("/v1/messages", json=body | {"tool_choice": {"type": "any"}})

    assert (answer.status_code, answer.headers["X-Ignored-Tools"]) == (200, "web_search_20250305")
    assert forced.status_code == 400


def test_an_image_in_a_result_is_told_as_a_note() -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}

    call = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]

    _, message = request(messages=turns).as_chat().messages

    assert isinstance(message.content, list)
    assert message.content[0].text == "[an image that cannot be shown: this model reads text only]"


def test_reasoning_that_is_not_to_be_shown_is_an_empty_block(loaded: Loaded) -> None:
    body = request(thinking={"type": "enabled", "display": "omitted"})

    def reply() -> MessagesReply:
        assert loaded.chat is not None
        prompt = loaded.chat.render(body.as_chat().as_prompt())
        served = Served("m", loaded, engine=None)  # type: ignore[arg-type]  # nothing is submitted
        return MessagesReply(body.as_chat(), prompt, served, hides_thinking=body.hides_thinking)

    script = "I wonder.</think>Yes."
    thinking, text = whole(reply(), Script(script))["content"]
    assert (thinking["thinking"], text["text"]) == ("", "Yes.")
    deltas = [
        event["delta"]["type"]
        for event in events(reply(), Script(script))
        if "content_block_delta" in event["type"]
    ]
    assert "thinking_delta" not in deltas


def test_turns_of_one_role_in_a_row_are_one() -> None:
    calls = [{"type": "tool_use", "id": name, "name": "look", "input": {}} for name in "AB"]
    results = [{"type": "tool_result", "tool_use_id": name, "content": name} for name in "AB"]
    turns = [{"role": "assistant", "content": [call]} for call in calls]
    turns += [{"role": "user", "content": [result]} for result in results]

    messages = request(messages=turns).as_chat().messages

    assert [message.tool_call_id for message in messages if message.role == "tool"] == ["A", "B"]


@pytest.mark.slow
@pytest.mark.parametrize("before", [[], [{"role": "assistant", "content": "Hm."}]])
def test_a_result_without_its_call_is_refused_in_the_vendors_words(
    http: httpx.Client, before: list[Any]
) -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny"}
    turns = [*SAY, *before, {"role": "user", "content": [result]}]

    answer = http.post("/v1/messages", json={"max_tokens": 2, "messages": turns})

    assert answer.status_code == 400
    assert "unexpected `tool_use_id` found in `tool_result` blocks: toolu_1" in answer.text
    assert f"messages[{len(turns) - 1}].content[0]" in answer.text
