"""Structured output over HTTP. The tiny model has random weights: what fits the form is the form's doing."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from tests.engine.grammar.random_answers import SCHEMAS
from tests.server.harness import LociServer

ASK: list[Any] = [{"role": "user", "content": "Answer in json."}]
PLAIN: dict[str, Any] = {"model": "v41-c", "messages": ASK, "reasoning_effort": "none", "max_tokens": 400}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["unit", "days"],
        },
    },
}


@pytest.mark.slow
def test_a_schema_needs_no_name(http: httpx.Client) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": {"const": "foo"}}}

    answer = http.post("/v1/chat/completions", json=PLAIN | {"response_format": wanted}).json()

    assert json.loads(answer["choices"][0]["message"]["content"]) == "foo"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Wheel(BaseModel):
    size: int = Field(ge=1, le=99)
    colour: Colour


class Car(BaseModel):
    doors: Literal[2, 4]
    wheels: list[Wheel] = Field(min_length=1, max_length=2)
    plate: str = Field(pattern=r"^[A-Z]{2}-[0-9]{3}$")
    electric: bool | None


@pytest.mark.slow
def test_the_sdk_parses_answers_into_models(client: openai.OpenAI) -> None:
    for seed in range(2):
        answer = client.chat.completions.parse(**PLAIN, seed=seed, response_format=Car)

        assert isinstance(answer.choices[0].message.parsed, Car)
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_streams_are_bound_too(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**PLAIN, seed=1, response_format=Car) as stream:
        for event in stream:
            assert str(event.type) != "error"
        final = stream.get_final_completion()

    assert isinstance(final.choices[0].message.parsed, Car)


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 100))
def test_any_schema_gives_valid_json(http: httpx.Client, schema: dict[str, Any], seed: int) -> None:
    body = {"model": "v41-c", "prompt": "x", "seed": seed, "max_tokens": 500}

    answer = http.post("/v1/completions", json=body | {"structured_outputs": {"json": schema}})

    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert jsonschema_rs.is_valid(schema, json.loads(choice["text"])), choice["text"]


def test_each_of_many_answers_is_bound_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **PLAIN, n=6, seed=3, extra_body={"structured_outputs": {"regex": "[a-z]{3}(-[a-z]{3})?"}}
    )

    texts = [choice.message.content or "" for choice in answer.choices]
    assert all(re.fullmatch("[a-z]{3}(-[a-z]{3})?", text) for text in texts)
    assert len(set(texts)) > 1


def test_the_same_seed_gives_the_same_structured_answer(http: httpx.Client) -> None:
    body = PLAIN | {"seed": 7, "structured_outputs": {"regex": "[a-z]{20}"}}

    def text() -> str:
        return str(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: text(), range(4)))) == 1


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"regex": "\\d{4}-\\d\\d-\\d\\d"}, "[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        ({"grammar": 'start: pair\npair: "(" DIGIT "," DIGIT ")"\nDIGIT: /[0-9]/'}, r"\([0-9],[0-9]\)"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_other_forms_bind_answers_on_both_routes(
    http: httpx.Client, path: str, wanted: dict[str, Any], pattern: str
) -> None:
    body = PLAIN | {"prompt": "x", "structured_outputs": wanted}

    (choice,) = http.post(path, json=body).json()["choices"]

    assert re.fullmatch(pattern, choice["text"] if "text" in choice else choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


def test_json_mode_needs_no_schema(http: httpx.Client) -> None:
    # A random model closes what it opened only if it is made to: here by wishing for braces.
    bias = {"response_format": {"type": "json_object"}, "logit_bias": {_id(http, "}"): 60}}

    (choice,) = http.post("/v1/chat/completions", json=PLAIN | bias).json()["choices"]

    assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_stop_strings_and_limits_cut_a_bound_answer(http: httpx.Client) -> None:
    body = {"model": "v41-c", "prompt": "x", "structured_outputs": {"regex": "[a-z]{9}STOP[a-z]{9}"}}

    def finish(**more: Any) -> tuple[str, str]:
        (choice,) = http.post("/v1/completions", json=body | {"max_tokens": 60} | more).json()["choices"]
        return choice["finish_reason"], choice["text"]

    reason, text = finish(stop="STOP")
    assert (reason, len(text)) == ("stop", 9)
    assert finish(max_tokens=2)[0] == "length"


def test_logprobs_are_the_models_own(http: httpx.Client) -> None:
    body = {"model": "v41-c", "prompt": "x", "max_tokens": 1, "logprobs": 5, "temperature": 0}

    free = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    bound = http.post("/v1/completions", json=body | {"structured_outputs": {"regex": "[0-9]"}}).json()

    logprobs = bound["choices"][0]["logprobs"]
    assert logprobs["tokens"][0].isdigit()
    best = {token: value for token, value in logprobs["top_logprobs"][0].items() if not token.isdigit()}
    assert best.items() <= free["top_logprobs"][0].items()
    assert logprobs["token_logprobs"][0] <= max(free["top_logprobs"][0].values())


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tools_are_called_with_valid_arguments(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        **PLAIN, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, seed=5
    )

    (call,) = answer.choices[0].message.tool_calls or [None]
    assert call
    assert call.type == "function"
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert jsonschema_rs.is_valid(TOOL["function"]["parameters"], json.loads(call.function.arguments))


@pytest.mark.slow
def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    other: Any = {
        "type": "function",
        "function": {"name": "other", "parameters": {"type": "object"}},
    }
    named = {"type": "function", "function": {"name": "weather"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}

    for seed in range(3):
        answer = client.chat.completions.create(
            **PLAIN, tools=[other, TOOL], tool_choice=choice, parallel_tool_calls=False, seed=seed
        )
        (call,) = answer.choices[0].message.tool_calls or [None]
        assert call
        assert call.type == "function"
        assert call.function.name == "weather"
    flat: list[Any] = [{"type": "function", "strict": False, **tool["function"]} for tool in (other, TOOL)]
    response = client.responses.create(
        model="v41-c",
        input="Hello",
        reasoning={"effort": "none"},
        tools=flat,
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "weather"}],
        },
        parallel_tool_calls=False,
    )
    (item,) = response.output
    assert item.type == "function_call"
    assert item.name == "weather"


def test_the_form_comes_behind_the_reasoning(http: httpx.Client) -> None:
    wish = {"logit_bias": {_id(http, "</think>"): 40}, "structured_outputs": {"choice": ["yes", "no"]}}

    body = {"model": "v41-c", "messages": ASK, "max_tokens": 400, "seed": 2} | wish
    (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]

    assert choice["message"]["content"] in ("yes", "no")
    assert choice["finish_reason"] == "stop"


def test_the_other_protocols_bind_answers_as_well(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "x", "schema": schema}

    response = http.post(
        "/v1/responses",
        json={"model": "v41-c", "input": "json", "reasoning": {"effort": "none"}, "text": {"format": form}},
    ).json()
    message = http.post(
        "/v1/messages",
        json={"model": "v41-c", "messages": ASK, "max_tokens": 99, "output_config": {"format": form}},
    ).json()

    texts = (response["output"][-1]["content"][0]["text"], message["content"][-1]["text"])
    assert all(json.loads(text)["a"] in (1, 2) for text in texts)


def _bound(path: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A request on `path` whose answer `schema` binds."""
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    match path:
        case "/v1/responses":
            response = {"model": "v41-c", "input": "x", "reasoning": {"effort": "none"}}
            return response | {"text": {"format": form}, "max_output_tokens": 60}
        case "/v1/messages":
            body: dict[str, Any] = {"model": "v41-c", "messages": ASK, "max_tokens": 60}
            return body | {"output_config": {"format": form}}
    chat = PLAIN | {"prompt": "x", "max_tokens": 60}
    return chat | {"response_format": {"type": "json_schema", "json_schema": form}}


PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/node"}},
    "required": ["next"],
    "additionalProperties": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_what_no_answer_can_match_is_refused_in_all_protocols(http: httpx.Client, path: str) -> None:
    beyond = {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 1}

    for schema in (NODE | {"$defs": {"node": NODE}}, beyond, {"const": 2**53 + 1}):
        answer = http.post(path, json=_bound(path, schema))

        assert answer.status_code == 400
        if path != "/v1/messages":
            assert answer.json()["error"]["code"] == "invalid_grammar"
    leaf = {"anyOf": [NODE, {"type": "null"}]}
    assert http.post(path, json=_bound(path, NODE | {"$defs": {"node": leaf}})).status_code == 200


def test_tools_whose_arguments_never_end_are_refused(http: httpx.Client) -> None:
    parameters = NODE | {"$defs": {"node": NODE}}
    function: dict[str, Any] = {"name": "f", "parameters": parameters, "strict": True}
    tool = {"type": "function", "function": function}
    flat = {"type": "function", **function}

    chat = http.post("/v1/chat/completions", json=PLAIN | {"tools": [tool]})
    response = http.post(
        "/v1/responses",
        json={"model": "v41-c", "input": "x", "tools": [flat]},
    )
    message = {"model": "v41-c", "messages": ASK, "max_tokens": 9, "tool_choice": {"type": "any"}}
    forced = http.post("/v1/messages", json=message | {"tools": [{"name": "f", "input_schema": parameters}]})

    assert [answer.status_code for answer in (chat, response, forced)] == [400] * 3
    assert chat.json()["error"]["code"] == response.json()["error"]["code"] == "invalid_grammar"
    assert chat.json()["error"]["param"] == "tools[0].function.parameters"


@pytest.mark.parametrize("path", PATHS)
def test_large_bounds_hold_to_the_last_digit(http: httpx.Client, path: str) -> None:
    schema = {"type": "integer", "minimum": 2**53 + 1, "exclusiveMaximum": 2**53 + 4}

    answer = http.post(path, json=_bound(path, schema))

    assert answer.status_code == 200
    said = json.dumps(answer.json().get("output", answer.json()))
    assert re.findall(r"\b90071992547409\d\d\b", said) == [str(2**53 + 2)]


def test_a_grammar_that_cannot_go_on_ends_the_stream_with_an_error(http: httpx.Client) -> None:
    # The vocabulary has the bytes of every character, so only a form without any text gets stuck.
    body = {"model": "v41-c", "prompt": "x", "structured_outputs": {"json": {"$ref": "#"}}, "stream": True}

    answer = http.post("/v1/completions", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_grammar"
    assert answer.json()["error"]["param"] == "structured_outputs.json"


@pytest.mark.slow
def test_hostile_schemas_do_not_stop_other_requests(server: LociServer) -> None:
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    hostile = {"model": "v41-c", "prompt": "x", "max_tokens": 1, "structured_outputs": {"json": wide}}
    short = {"model": "v41-c", "prompt": "x", "max_tokens": 1}

    def post(body: dict[str, Any]) -> int:
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code

    with ThreadPoolExecutor(8) as pool:
        bombs = [pool.submit(post, hostile | {"seed": i}) for i in range(4)]
        assert [post(short) for _ in range(5)] == [200] * 5
        assert {bomb.result() for bomb in bombs} <= {200, 400, 429}


def _id(http: httpx.Client, text: str) -> str:
    (token,) = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    return str(token)
