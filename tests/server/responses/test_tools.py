"""Tools of all kinds: what the model is shown of them, and what clients get back. A script answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from engine.families.loader import Loaded, load
from server.responses.reply import ResponsesReply
from server.responses.requests import ResponsesRequest
from server.serving.service import Served
from tests.server.harness import TINY
from tests.server.responses.helpers import PLAIN, ask
from tests.server.scripted import Script, events

TOOLS: list[dict[str, Any]] = [
    {"type": "web_search"},
    {"type": "namespace", "name": "crm", "description": "Customers", "tools": [
        {"type": "function", "name": "find", "parameters": {"type": "object", "properties": {}}},
        {"type": "mcp", "server_label": "x"},
    ]},
    {"type": "custom", "name": "apply_patch", "description": "Edits.", "format": {
        "type": "grammar", "syntax": "lark", "definition": "start: /.*/"}},
]  # fmt: skip
CALLS = (
    "<｜DSML｜ calls>\n"
    '<｜DSML｜ invoke name="crm__find">\n</｜DSML｜ invoke>\n'
    '<｜DSML｜ invoke name="apply_patch">\n'
    '<｜DSML｜ parameter name="input" string="true">*** Begin\n"x"</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n'
    "</｜DSML｜ calls>"
)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(TINY)


def reply_to(loaded: Loaded, **fields: Any) -> ResponsesReply:
    body = ResponsesRequest.model_validate({"input": "Hi", "reasoning": {"effort": "none"}} | fields)
    assert loaded.chat is not None
    prompt = loaded.chat.render(body.as_chat().as_prompt())
    served = Served("m", loaded, engine=None)  # type: ignore[arg-type]  # nothing is submitted
    return ResponsesReply(body, body.as_chat(), prompt, served, lambda *_: None)


def test_the_model_is_shown_functions() -> None:
    chat = ResponsesRequest.model_validate({"input": "Hi", "tools": TOOLS}).as_chat()

    find, patch = (tool.function for tool in chat.tools or [])
    assert find.name == "crm__find"
    assert patch.name == "apply_patch"
    assert patch.description == "Edits."
    assert (patch.parameters or {})["properties"]["input"]["x-lark"] == "start: /.*/"
    assert patch.strict


def test_calls_come_back_as_clients_know_their_tools(loaded: Loaded) -> None:
    told = events(reply_to(loaded, tools=TOOLS), Script(CALLS))

    find, patch = told[-1]["response"]["output"]
    assert (find["type"], find["namespace"], find["name"]) == ("function_call", "crm", "find")
    assert (patch["type"], patch["name"], patch["input"]) == (
        "custom_tool_call",
        "apply_patch",
        '*** Begin\n"x"',
    )
    (delta,) = [event for event in told if event["type"] == "response.custom_tool_call_input.delta"]
    (done,) = [event for event in told if event["type"] == "response.custom_tool_call_input.done"]
    assert delta["delta"] == done["input"] == patch["input"]
    assert delta["item_id"] == patch["id"]


def test_calls_of_the_history_are_those_of_the_functions() -> None:
    body = ResponsesRequest.model_validate({"tools": TOOLS, "input": [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "a", "namespace": "crm", "name": "find", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "b", "name": "apply_patch", "input": "x"},
        {"type": "function_call_output", "call_id": "a", "output": "none"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": [
            {"type": "input_text", "text": "ok"}, {"type": "input_image", "image_url": "x"}]},
    ]})  # fmt: skip

    _, turn, first, second = body.as_chat().messages
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in turn.tool_calls or []]
    assert calls == [("crm__find", {}), ("apply_patch", {"input": "x"})]
    assert first.content == "none"
    assert isinstance(second.content, list)
    assert second.content[1].text == "[an image that cannot be shown: this model reads text only]"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "function", "name": "find", "namespace": "crm"}, "crm__find"),
        ({"type": "custom", "name": "apply_patch"}, "apply_patch"),
    ],
)
def test_a_choice_names_what_the_client_knows(choice: dict[str, Any], expected: str) -> None:
    body = ResponsesRequest.model_validate({"input": "Hi", "tools": TOOLS, "tool_choice": choice})

    assert body.as_chat().as_prompt()["tool_choice"]["function"]["name"] == expected


def test_of_the_tools_allowed_those_that_run_elsewhere_are_left_out() -> None:
    def choice(*tools: dict[str, Any]) -> Any:
        allowed = {"type": "allowed_tools", "mode": "auto", "tools": list(tools)}
        body = ResponsesRequest.model_validate({"input": "Hi", "tools": TOOLS, "tool_choice": allowed})
        return body.as_chat().as_prompt()["tool_choice"]

    assert choice({"type": "web_search"}) == "none"
    assert choice({"type": "web_search"}, {"type": "custom", "name": "apply_patch"}) == "auto"


def test_a_header_says_what_the_model_is_not_shown(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json={"input": "Hi", "tools": TOOLS} | PLAIN)

    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Tools"] == "web_search, mcp"
    assert "X-Ignored-Tools" not in http.post("/v1/responses", json={"input": "Hi"} | PLAIN).headers


def test_items_may_be_named_by_their_ids(client: openai.OpenAI) -> None:
    first = ask(client, "My name is Ada.")
    question = {"role": "user", "content": "What is my name?"}

    def answer(*items: Any) -> str:
        return str(
            ask(client, [{"role": "user", "content": "My name is Ada."}, *items, question]).output_text
        )

    (item,) = first.output
    itself = item.model_dump(exclude={"id"})
    assert answer({"type": "item_reference", "id": item.id}) == answer({"id": item.id}) == answer(itself)


def test_an_item_that_is_not_kept_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'msg_x' is not stored on this server") as caught:
        ask(client, [{"type": "item_reference", "id": "msg_x"}])

    assert (caught.value.param, caught.value.code) == ("input[0].id", "item_not_found")


def test_reasoning_comes_as_its_summary_where_that_is_asked_for(loaded: Loaded) -> None:
    reasoning = {"effort": "high", "summary": "auto"}

    told = events(reply_to(loaded, reasoning=reasoning), Script("I wonder.</think>Yes."))

    thoughts, _ = told[-1]["response"]["output"]
    assert thoughts["summary"] == [{"type": "summary_text", "text": "I wonder."}]
    assert "content" not in thoughts
    kinds = [event["type"] for event in told if event.get("item_id") == thoughts["id"]]
    assert kinds[0] == "response.reasoning_summary_part.added"
    assert kinds[-2:] == ["response.reasoning_summary_text.done", "response.reasoning_summary_part.done"]
    deltas = [event for event in told if event["type"] == "response.reasoning_summary_text.delta"]
    assert "".join(event["delta"] for event in deltas) == "I wonder."
    assert {event["summary_index"] for event in deltas} == {0}
