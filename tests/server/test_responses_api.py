"""The Responses interface, as the real OpenAI SDK sees it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import deepseek_recipe as recipe
import httpx
import openai
import pytest
from openai.types.responses import ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from engine.generation import FinishReason, Output, TokenLogprob
from engine.loader import Loaded, load
from server.errors import ApiError
from server.openai_messages import Message
from server.response_store import ResponseStore, StoredResponse
from server.responses import ResponsesReply
from server.responses_types import ResponsesRequest
from server.service import Served
from tests.server.harness import TINY
from tests.server.scripted import CALLS, Script, events, whole

MODEL = "v41-c"
PLAIN: dict[str, Any] = {"reasoning": {"effort": "none"}, "max_output_tokens": 8, "temperature": 0}
TOOLS: list[Any] = [
    {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, "strict": False}
    for name in ("weather", "time")
]


def ask(client: openai.OpenAI, content: Any = "Hello", **fields: Any) -> Any:
    return client.responses.create(**({"model": MODEL, "input": content} | PLAIN | fields))


def chat_text(client: openai.OpenAI, messages: list[Any], **fields: Any) -> str | None:
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, reasoning_effort="none", **fields
    )
    return answer.choices[0].message.content


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


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    response = ask(client, reasoning={"effort": "low"})

    (item,) = response.output
    assert isinstance(item, ResponseReasoningItem)
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
    assert deltas == expected.output_text == seen[-1].response.output_text
    assert len({event.item_id for event in seen if hasattr(event, "item_id")}) == 1


def test_events_are_named_and_there_is_no_done_line(http: httpx.Client) -> None:
    body = {"model": MODEL, "input": "Hello", "stream": True} | PLAIN
    page = http.post("/v1/responses", json=body).text

    blocks = [block.splitlines() for block in page.strip().split("\n\n")]
    assert "[DONE]" not in page
    for name, data in blocks:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_a_conversation_goes_on_from_a_kept_response(client: openai.OpenAI) -> None:
    first = ask(client, "My name is Ada.", instructions="not carried over")
    second = ask(client, "Who am I?", previous_response_id=first.id)
    history = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Who am I?"},
    ]

    assert second.previous_response_id == first.id
    assert second.output_text == chat_text(client, history)
    assert ask(client, history).output_text == second.output_text
    assert ask(client, [*history[:1], *first.output, history[2]]).output_text == second.output_text


def test_a_kept_response_can_be_fetched_and_forgotten(client: openai.OpenAI) -> None:
    response = ask(client)

    assert client.responses.retrieve(response.id) == response
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="is not kept here"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError, match="is not kept here; send its items") as caught:
        ask(client, previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(response.id)


def test_what_a_response_answers_can_be_read_back_page_by_page(client: openai.OpenAI) -> None:
    items = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    response = ask(client, items, tools=TOOLS)

    oldest_first = list(client.responses.input_items.list(response.id, order="asc", limit=3))
    newest_first = list(client.responses.input_items.list(response.id))

    assert [item.type for item in oldest_first] == [
        "message",
        "message",
        "function_call",
        "function_call_output",
    ]
    assert [item.id for item in newest_first] == [item.id for item in reversed(oldest_first)]
    user, assistant, call, output = (item.to_dict() for item in oldest_first)
    assert user["content"] == [{"type": "input_text", "text": "Hello"}]
    assert assistant["content"] == [{"type": "output_text", "text": "Hi."}]
    assert (call["name"], call["arguments"], output["output"]) == ("weather", "{}", "rain")
    assert ask(client, oldest_first, tools=TOOLS).output_text == response.output_text
    (only,) = client.responses.input_items.list(ask(client, "Hello").id)
    assert only.to_dict()["content"] == user["content"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("order=up", "order"),
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("after=nothing", "after"),
    ],
)
def test_a_page_that_cannot_be_is_refused(
    client: openai.OpenAI, http: httpx.Client, query: str, param: str
) -> None:
    answer = http.get(f"/v1/responses/{ask(client).id}/input_items?{query}")

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_response_that_has_ended_cannot_be_cancelled(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client.responses.cancel(ask(client).id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_0")
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_0")


def test_log_probabilities_are_those_of_a_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], logprobs=True, top_logprobs=2,
        max_tokens=8, temperature=0, reasoning_effort="none",
    )  # fmt: skip
    expected = [(t.token, t.logprob, len(t.top_logprobs)) for t in chat.choices[0].logprobs.content]

    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    with client.responses.stream(model=MODEL, input="Hello", top_logprobs=2, **PLAIN) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]

    (part,) = response.output[0].content
    assert [(t.token, t.logprob, len(t.top_logprobs)) for t in part.logprobs] == expected
    assert response.top_logprobs == 2
    streamed = [(t.token, t.logprob, len(t.top_logprobs)) for event in deltas for t in event.logprobs]
    assert streamed == expected
    assert ask(client).output[0].content[0].logprobs == []


def test_reasoning_has_no_log_probabilities(reply: NewReply, loaded: Loaded) -> None:
    end = loaded.tokenizer.added_tokens["</think>"]
    asking = reply("high", include=["message.output_text.logprobs"])
    outputs = [("Hm", 40), ("</think>", end), ("A", 41), ("b", 42), ("", 1)]

    class Told:
        async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
            for text, token in outputs:
                is_last = token == 1
                yield (
                    0,
                    Output(
                        text,
                        (token,),
                        (TokenLogprob(token, -0.5),),
                        finish_reason=FinishReason.STOP if is_last else None,
                        stop_match=token if is_last else None,
                    ),
                )

    response = whole(asking, Told())  # type: ignore[arg-type]

    message = response["output"][1]
    assert message["content"][0]["text"] == "Ab"
    expected = [loaded.tokenizer.token_bytes(token).decode(errors="replace") for token in (41, 42)]
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == expected


def test_a_response_is_not_kept_where_the_client_says_so(client: openai.OpenAI) -> None:
    response = ask(client, store=False)

    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


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
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "not supported"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "required"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content[0].type",
            "parts of type 'input_image' are not supported; send text",
        ),
        ({"input": []}, "input", "at least 1 item"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"background": True}, "background", "use stream"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "no stored prompts"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"include": "all"}, "include", "valid array"),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
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


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(TINY)


Kept = list[tuple[dict[str, Any], Message]]
NewReply = Callable[..., ResponsesReply]


@pytest.fixture
def kept() -> Kept:
    return []


@pytest.fixture
def reply(loaded: Loaded, kept: Kept) -> NewReply:
    def new(effort: str = "none", **fields: Any) -> ResponsesReply:
        body = ResponsesRequest.model_validate(
            {"model": "m", "input": "Hello", "tools": TOOLS, "reasoning": {"effort": effort}} | fields
        )
        assert loaded.chat is not None
        prompt = loaded.chat.render(body.as_chat().as_prompt())
        served = Served("m", loaded, engine=None)  # type: ignore[arg-type]  # nothing is submitted
        return ResponsesReply(body, body.as_chat(), prompt, served, lambda *what: kept.append(what))

    return new


def test_reasoning_text_and_calls_are_items_in_that_order(reply: NewReply, kept: Kept) -> None:
    response = whole(reply("high"), Script("I wonder.</think>" + CALLS))

    reasoning, message, weather, time = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "I wonder."}]
    assert message["content"][0]["text"] == "Let me look."
    assert (weather["type"], weather["name"]) == ("function_call", "weather")
    assert json.loads(weather["arguments"]) == {"city": "Paris"}
    assert json.loads(time["arguments"]) == {"zone": 1}
    assert response["status"] == "completed"
    ((stored, answer),) = kept
    assert stored is response
    assert answer.reasoning_content == "I wonder."
    assert [call.id for call in answer.tool_calls or []] == [weather["call_id"], time["call_id"]]


def test_streamed_arguments_add_up_to_those_of_the_call(reply: NewReply) -> None:
    seen = events(reply("high"), Script("I wonder.</think>" + CALLS))

    added = [event["item"]["type"] for event in seen if event["type"] == "response.output_item.added"]
    assert added == ["reasoning", "message", "function_call", "function_call"]
    for event in seen:
        if event["type"] == "response.function_call_arguments.done":
            deltas = [
                other["delta"]
                for other in seen
                if other["type"] == "response.function_call_arguments.delta"
                and other["item_id"] == event["item_id"]
            ]
            assert "".join(deltas) == event["arguments"]
    done = [event["item"] for event in seen if event["type"] == "response.output_item.done"]
    assert done == seen[-1]["response"]["output"]
    assert [event["sequence_number"] for event in seen] == list(range(len(seen)))


def test_a_call_that_was_cut_off_is_incomplete(reply: NewReply) -> None:
    response = whole(reply(), Script(CALLS[:-40], FinishReason.LENGTH))

    assert response["status"] == "incomplete"
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "incomplete"]


def test_a_failure_is_an_event_with_what_there_was(reply: NewReply) -> None:
    failing = reply()

    event = failing.failure(ApiError(500, "the engine failed"))

    assert event["type"] == "response.failed"
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"]["message"] == "the engine failed"


def test_items_are_rendered_as_the_vendors_library_does(loaded: Loaded) -> None:
    items = [
        {"role": "user", "content": "What is it like?"},
        {
            "type": "reasoning",
            "id": "r",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hmm"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "9"}, {"type": "input_text", "text": "am"}],
        },
    ]
    body = {"model": "m", "instructions": "Be kind.", "input": items, "tools": TOOLS}
    options = recipe.ConversionOptions().with_model_alias("m", recipe.ModelVersion.DeepseekV41Flash)
    theirs = recipe.ResponsesRequest(body).convert(options).conversation
    expected = recipe.DeepseekV41Encoding().render_conversation(theirs)

    assert loaded.chat is not None
    ours = loaded.chat.render(ResponsesRequest.model_validate(body).as_chat().as_prompt())

    assert ours.token_ids == loaded.tokenizer.encode_prompt(expected.prompt, expected.special_ranges)


def stored(name: str, owner: str | None = None) -> StoredResponse:
    return StoredResponse(owner, {"id": name}, (Message(role="user", content="x" * 100),))


def test_the_store_forgets_what_was_not_used_for_longest() -> None:
    store = ResponseStore(3 * stored("a").size_bytes)
    for name in ("a", "b", "c"):
        store.put(stored(name))
    store.get("a", None)

    store.put(stored("d"))

    assert [name for name in ("a", "b", "c", "d") if store.get(name, None)] == ["a", "c", "d"]


def test_the_store_shows_a_response_to_its_owner_only() -> None:
    store = ResponseStore(10_000)
    store.put(stored("a", owner="ada"))

    assert store.get("a", "bob") is None
    assert not store.remove("a", None)
    assert store.get("a", "ada") is not None


def test_a_store_without_room_keeps_nothing() -> None:
    store = ResponseStore(0)
    store.put(stored("a"))

    assert store.get("a", None) is None
