"""The Responses interface, as the real OpenAI SDK sees it."""

from __future__ import annotations

import json
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from tests.server.responses.helpers import MODEL, PLAIN, TOOLS, ask, chat_text


def test_a_text_is_answered_as_in_a_chat(client: openai.OpenAI) -> None:
    response = ask(client, instructions="Be kind.")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]

    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert response.output_text == chat_text(client, messages)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert message.status == "incomplete"
    assert response.instructions == "Be kind."
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    assert response.usage.input_tokens_details.cached_tokens >= 0


def test_an_answer_that_ends_by_itself_is_completed(client: openai.OpenAI) -> None:
    text = ask(client, max_output_tokens=20).output_text

    response = ask(client, max_output_tokens=20, extra_body={"stop": text[5:8]})

    assert response.status == "completed"
    assert response.incomplete_details is None
    assert response.output_text == text[: text.index(text[5:8])]


def test_a_text_without_a_form_is_told_to_be_plain(client: openai.OpenAI) -> None:
    response = ask(client, text={"verbosity": "low"})

    assert response.text.format.type == "text"


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    response = ask(client, reasoning={"effort": "low"})

    (item,) = response.output
    assert isinstance(item, ResponseReasoningItem)
    assert item.content
    assert item.content[0].type == "reasoning_text"
    assert response.usage.output_tokens_details.reasoning_tokens == 8
    assert response.reasoning.effort == "low"


def test_a_stream_tells_the_whole_response_step_by_step(client: openai.OpenAI) -> None:
    expected = ask(client)
    with client.responses.stream(model=MODEL, input="Hello", **PLAIN) as stream:
        seen = list(stream)

    kinds = [event.type for event in seen]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    deltas = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    last = seen[-1]
    assert last.type == "response.incomplete"
    assert deltas == expected.output_text == last.response.output_text
    assert len({event.item_id for event in seen if hasattr(event, "item_id")}) == 1


def test_events_are_named_and_there_is_no_done_line(http: httpx.Client) -> None:
    body = {"model": MODEL, "input": "Hello", "stream": True} | PLAIN
    page = http.post("/v1/responses", json=body).text

    blocks = [block.splitlines() for block in page.strip().split("\n\n")]
    assert "[DONE]" not in page
    for name, data in blocks:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_log_probabilities_are_those_of_a_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], logprobs=True, top_logprobs=2,
        max_tokens=8, temperature=0, reasoning_effort="none",
    )  # fmt: skip
    assert chat.choices[0].logprobs
    expected = [(t.token, t.logprob, len(t.top_logprobs)) for t in chat.choices[0].logprobs.content or ()]

    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    with client.responses.stream(model=MODEL, input="Hello", top_logprobs=2, **PLAIN) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]

    (part,) = response.output[0].content
    assert [(t.token, t.logprob, len(t.top_logprobs)) for t in part.logprobs] == expected
    assert response.top_logprobs == 2
    streamed = [(t.token, t.logprob, len(t.top_logprobs or ())) for event in deltas for t in event.logprobs]
    assert streamed == expected
    assert ask(client).output[0].content[0].logprobs == []


def test_results_of_calls_are_part_of_the_next_turn(client: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "rain"}
    function = {"name": "weather", "arguments": "{}"}
    messages = [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    tools = [
        {"type": "function", "function": {"name": t["name"], "parameters": t["parameters"], "strict": False}}
        for t in TOOLS
    ]

    response = ask(client, [{"role": "user", "content": "Hello"}, call, result], tools=TOOLS)

    assert response.output_text == chat_text(client, messages, tools=tools)
    assert [tool.name for tool in response.tools] == ["weather", "time"]


class Weather(BaseModel):
    unit: Literal["C", "F"]
    rains: bool


@pytest.mark.slow
def test_the_sdk_parses_answers_into_models(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model=MODEL, input="Answer in json.", text_format=Weather, **PLAIN | {"max_output_tokens": 60}
    )

    assert isinstance(response.output_parsed, Weather)
    assert response.status == "completed"


def test_a_tool_can_be_forced_and_its_arguments_parsed(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")["function"] | {"type": "function"}
    choice: Any = {"type": "function", "name": "weather"}
    fields: Any = PLAIN | {"max_output_tokens": 200, "tools": [tool], "tool_choice": choice}

    with client.responses.stream(model=MODEL, input="Hello", **fields) as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()

    (call,) = final.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert Weather.model_validate(call.parsed_arguments)
    assert "".join(deltas) == call.arguments


def test_a_schema_that_cannot_be_kept_is_named_as_it_was_sent(http: httpx.Client) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "no such type"}}
    answer = http.post("/v1/responses", json={"model": MODEL, "input": "Hello", "text": {"format": form}})

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"].startswith("text.format"), error
    assert "response_format" not in error["message"]


def test_input_tokens_are_counted_without_answering(client: openai.OpenAI) -> None:
    count = client.responses.input_tokens.count(model=MODEL, input="Hello", reasoning={"effort": "none"})

    assert count.input_tokens == ask(client).usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": 5}, "input", "valid string, got 5"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "'user'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "required"),
        ({"input": [{"content": "x"}]}, "input[0].role", "required"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "'computer_call' are not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id", "send the item itself"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "required"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content[0].type",
            "Could not process image: parts of type 'input_image' are not supported",
        ),
        ({"input": []}, "input", "at least 1 item"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at least 1"),
        ({"background": True}, "background", "use stream"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "no stored prompts"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"include": "all"}, "include", "valid array"),
        ({"truncation": "always"}, "truncation", "'disabled'"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tools": [{"type": "mcp"}], "tool_choice": "required"}, "tool_choice", "got only mcp"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "asks for web_search"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'none', 'minimal'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"temperature": 11}, "temperature", "between 0 and 10"),
        ({"input": "word " * 3000}, "input", "maximum context length is 2048 tokens"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, fields: dict[str, Any], param: str, message: str) -> None:
    answer = http.post("/v1/responses", json={"model": MODEL, "input": "Hello"} | fields)

    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert message in error["message"]
    assert error["param"] == param
