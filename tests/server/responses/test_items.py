"""Items of responses: reasoning, text and calls. A script plays the engine: the tiny model calls no tools."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import deepseek_recipe as recipe
import pytest

from engine.families.loader import Loaded, load
from engine.output import FinishReason, Output, TokenLogprob
from server.http.errors import ApiError
from server.openai.messages import Message
from server.responses.reply import ResponsesReply
from server.responses.requests import ResponsesRequest
from server.serving.service import Served
from tests.server.harness import TINY
from tests.server.responses.helpers import TOOLS
from tests.server.scripted import CALLS, Script, events, whole


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
    expected = [loaded.tokenizer.token_text(token) for token in (41, 42)]
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == expected


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
