"""What the tests of vLLM's server ask of the Responses and Messages routes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pydantic

from tests.clients.others.checks import RESPONSES, SAY, Asked, Suite
from tests.clients.others.vllm import VLLM
from tests.clients.others.vllm_calls import WEATHER

FILES = ("basic", "simple", "stateful", "structured_output", "function_call")
BASIC, SIMPLE, STATEFUL, FORMS, CALLS = (f"responses/test_{name}.py" for name in FILES)
VLLM_MESSAGES = Suite("vLLM: tests/entrypoints/anthropic")
# The model that answers reasons for as long as it may unless it is told not to.
# Greedy: a draw may end an answer before its first word.
PLAIN: dict[str, Any] = {
    "input": "Hello",
    "max_output_tokens": 8,
    "temperature": 0,
    "reasoning": {"effort": "none"},
}
EVENT = {
    "type": "object",
    "properties": {
        "event_name": {"enum": ["fair", "play"]},
        "date": {"enum": ["Friday", "Monday"]},
    },
    "required": ["event_name", "date"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "get_current_weather", "parameters": WEATHER}


def _text(response: Any) -> str:
    return str(response["output"][-1]["content"][0]["text"])


@VLLM.test(BASIC, "test_simple_input", "test_chat_with_input_type", note="what is said is not asked")
@VLLM.test(BASIC, "test_instructions", "test_chat", note="what is said is not asked")
@VLLM.test(SIMPLE, "test_basic", "test_extra_sampling_params")
@VLLM.test(SIMPLE, "test_input_history_openai_shape_e2e", "test_input_history_openresponses_shape_e2e")
@VLLM.test(SIMPLE, "test_multiturn_history_replay_without_ids_e2e", "test_reasoning_item")
def _inputs(ask: Asked) -> None:
    user: dict[str, Any] = {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "Hello!"}],
    }
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}
    thought: dict[str, Any] = {"type": "reasoning", "summary": [], "encrypted_content": None}
    told: dict[str, Any] = {"type": "reasoning", "id": "lol", "summary": []}
    told |= {"content": [{"type": "reasoning_text", "text": "We need to respond."}]}
    ids = [said | {"id": "msg_1", "status": "completed"}, thought | {"id": "rs_1", "status": "completed"}]
    system = {"role": "system", "content": "Finish with QED."}
    for given in (
        "What is 13 * 24?",
        [{"role": "user", "content": user["content"]}],
        [system, {"role": "user", "content": "5 * 3?"}, {"role": "assistant", "content": "15. QED."}, user],
        [user, *ids, user],
        [user, said, thought, user],
        [user, told],
    ):
        assert _text(ask.post(RESPONSES, **PLAIN | {"input": given}))
    assert _text(ask.post(RESPONSES, **PLAIN, instructions="Finish with QED."))
    assert _text(ask.post(RESPONSES, **PLAIN, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=42))


@VLLM.test(BASIC, "test_logprobs")
@VLLM.test(SIMPLE, "test_streaming_logprobs")
def _logprobs(ask: Asked) -> None:
    wanted = PLAIN | {"top_logprobs": 5, "include": ["message.output_text.logprobs"]}
    told = ask.post(RESPONSES, **wanted)["output"][-1]["content"][-1]["logprobs"]
    assert {len(token["top_logprobs"]) for token in told} == {5}
    events = ask.events(RESPONSES, **wanted)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert deltas
    assert all(token["logprob"] <= 0 for event in deltas for token in event["logprobs"])


@VLLM.test(BASIC, "test_streaming")
@VLLM.test(SIMPLE, "test_streaming_output_consistency", "test_streaming_types")
@VLLM.test(CALLS, "test_function_calling_with_streaming_types")
def _streams(ask: Asked) -> None:
    call = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 600}
    for body in (PLAIN, PLAIN | {"reasoning": {"effort": "low"}, "tools": []}, PLAIN | call):
        events = ask.events(RESPONSES, **body, background=False)
        assert events[0]["type"] == "response.created"
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        open_: list[str] = []
        for event in events[1:-1]:
            kind, _, step = event["type"].rpartition(".")
            if step == "added" or (step == "delta" and open_[-1] != kind):
                open_.append(kind)
            elif step == "done":
                assert open_.pop() == kind
        assert open_ == []
        said = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
        whole = [item for item in events[-1]["response"]["output"] if item["type"] == "message"]
        assert said == "".join(part["text"] for item in whole for part in item["content"])


@VLLM.test(SIMPLE, "test_streaming_reasoning_tokens_e2e", "test_non_streaming_reasoning_tokens_e2e")
@VLLM.test(SIMPLE, "test_max_tokens")
def _reasoning(ask: Asked) -> None:
    body = PLAIN | {"reasoning": {"effort": "low"}, "max_output_tokens": 30, "min_tokens": 30}
    for response in (ask.post(RESPONSES, **body), ask.events(RESPONSES, **body)[-1]["response"]):
        assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        assert response["status"] == "incomplete"
        assert response["incomplete_details"]["reason"] == "max_output_tokens"


@VLLM.test(STATEFUL, "test_store", "test_previous_response_id", "test_two_responses_with_same_prev_id")
@VLLM.test(STATEFUL, "test_cancel_completed")
def _store(ask: Asked) -> None:
    first = ask.post(RESPONSES, **PLAIN)
    assert ask.get(f"{RESPONSES}/{first['id']}")["status"] == first["status"]
    for _ in range(2):
        second = ask.post(RESPONSES, **PLAIN, previous_response_id=first["id"])
        assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    ask.refused(f"{RESPONSES}/{first['id']}/cancel")
    unkept = ask.post(RESPONSES, **PLAIN, store=False)
    assert ask.http.get(f"{RESPONSES}/{unkept['id']}").status_code == 404


@VLLM.test(STATEFUL, "test_background_error", note="`background` is refused by name")
def _background(ask: Asked) -> None:
    assert ask.refused(RESPONSES, **PLAIN, background=True, store=False)["param"] == "background"


@VLLM.test(FORMS, "test_structured_output", "test_structured_output_with_parse", note="the form")
def _forms(ask: Asked) -> None:
    form = {"type": "json_schema", "name": "calendar_event", "schema": EVENT, "strict": True}
    body = PLAIN | {"max_output_tokens": 500, "text": {"format": form}}
    jsonschema_rs.validate(EVENT, json.loads(_text(ask.post(RESPONSES, **body))))

    class Day(pydantic.BaseModel):
        day: bool

    fields = PLAIN | {"max_output_tokens": 500}
    parsed = ask.sdk.responses.parse(model="v41-c", text_format=Day, **fields)
    assert isinstance(parsed.output_parsed, Day)


@VLLM.test(CALLS, "test_function_tool_use", note="`tool_choice` other than `auto`: the model is untrained")
@VLLM.test(CALLS, "test_named_tool_use", "test_function_calling_with_streaming_expected_arguments")
def _calls(ask: Asked) -> None:
    for choice in ("required", {"type": "function", "name": "get_current_weather"}):
        body = PLAIN | {"tools": [TOOL], "tool_choice": choice, "max_output_tokens": 600}
        body |= {"parallel_tool_calls": False}
        call = next(i for i in ask.post(RESPONSES, **body)["output"] if i["type"] == "function_call")
        jsonschema_rs.validate(WEATHER, json.loads(call["arguments"]))
        events = ask.events(RESPONSES, **body)
        kind = "response.function_call_arguments"
        pieces = "".join(event["delta"] for event in events if event["type"] == f"{kind}.delta")
        (done,) = (event["arguments"] for event in events if event["type"] == f"{kind}.done")
        assert pieces == done
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "20°C"}
        question = {"role": "user", "content": "And in Paris?"}
        assert _text(ask.post(RESPONSES, **PLAIN | {"input": [question, call, result]}))


@VLLM.test(CALLS, "test_max_tokens_with_tool_choice_required")
def _cut_call(ask: Asked) -> None:
    body = PLAIN | {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 1}
    response = ask.post(RESPONSES, **body)
    assert not any(item["type"] == "function_call" for item in response["output"])
    assert response["incomplete_details"]["reason"] == "max_output_tokens"


@VLLM.test("responses/test_count_tokens.py", "test_count_responses_input_tokens")
def _count(ask: Asked) -> None:
    counted = ask.post(f"{RESPONSES}/input_tokens", **PLAIN)["input_tokens"]
    assert counted == ask.post(RESPONSES, **PLAIN)["usage"]["input_tokens"]


@VLLM_MESSAGES.test("test_messages.py", "test_simple_messages", "test_system_message")
@VLLM_MESSAGES.test("test_messages.py", "test_anthropic_streaming", "test_anthropic_tool_call")
def _messages(ask: Asked) -> None:
    body: dict[str, Any] = {"model": "claude-3-7-sonnet-latest", "max_tokens": 300, "messages": SAY}
    tool: Any = {"name": "get_current_weather", "input_schema": WEATHER}
    plain = ask.claude.messages.create(**body, system="you are a helpful assistant")
    assert (plain.role, plain.type) == ("assistant", "message")
    with ask.claude.messages.stream(**body) as stream:
        assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens")
    choice: Any = {"type": "any"}
    called = ask.claude.messages.create(**body | {"max_tokens": 600}, tools=[tool], tool_choice=choice)
    assert called.content[-1].type == "tool_use"
    assert called.stop_reason in ("tool_use", "max_tokens")  # the model may go on calling


@VLLM.test("test_models.py", "test_check_models", note="without adapters")
def _models(ask: Asked) -> None:
    (model,) = ask.sdk.models.list().data
    assert (model.id, model.object) == ("v41-c", "model")
