"""Each kind of bad request is refused with a message that names what is wrong."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

CHAT: dict[str, Any] = {"model": "v41-c", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
PLAIN = {"model": "v41-c", "prompt": "Hello", "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "f"}}


def called(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(levels: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(levels - 1)}} if levels else {"type": "object"}


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": "12"}, "max_tokens", "valid integer, got the string '12'"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"temperature": "hot"}, "temperature", "valid number, got the string 'hot'"),
        ({"temperature": -1}, "temperature", "between 0 and 10"),
        ({"top_p": -0.1}, "top_p", "between 0 and 1"),
        ({"top_k": -2}, "top_k", "0 (off) or greater"),
        ({"min_tokens": -1}, "min_tokens", "0 (off) or greater"),
        ({"min_tokens": 5}, "min_tokens", "min_tokens is 5, more than max_tokens (4)"),
        ({"min_p": 2}, "min_p", "between 0 and 1"),
        ({"frequency_penalty": 3}, "frequency_penalty", "between -2 and 2"),
        ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 10"),
        ({"stream": "yes"}, "stream", "valid boolean, got the string 'yes'"),
        ({"n": 0}, "n", "greater than or equal to 1, got 0"),
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"seed": 1.5}, "seed", "valid integer, got 1.5"),
        ({"stop": 5}, "stop", "valid string, got 5"),
        ({"stop": [5]}, "stop[0]", "valid string, got 5"),
        ({"stop": ["x"] * 17}, "stop", "up to 16 strings, got 17"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "valid integer"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "outside the vocabulary"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "ids 0 to 1023"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is not a token id"),
        ({"logit_bias": {"x": 1, "y": 1}}, "logit_bias", "'x', 'y' are not token ids"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias", "'05' repeats token 5"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": CHAT["messages"] * 16_385}, "messages", "at most 16384 items"),
        (user([{"type": "text", "text": "a"}] * 16_385), "messages[0].content", "at most 16384 items"),
        ({"messages": "Hello"}, "messages", "valid array, got the string 'Hello'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system', 'developer'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "required"),
        (user(5), "messages[0].content", "valid string, got 5"),
        (user([{"type": "text"}]), "messages[0].content[0].text", "required"),
        (
            user([{"type": "image_url", "image_url": {"url": "http://x"}}]),
            "messages[0].content[0].type",
            "Could not process image: parts of type 'image_url' are not supported",
        ),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "'text', 'json_object' or 'json_schema'",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "must contain the word 'json'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (json_schema({"not": {}}), "response_format.json_schema.schema", 'Unimplemented keys: ["not"]'),
        (json_schema({"type": "king"}), "response_format", '"king" is not valid'),
        (json_schema({"$ref": "http://x/y"}), "response_format", "cannot fetch"),
        (json_schema({"enum": []}), "response_format.json_schema.schema", "Unsatisfiable"),
        (json_schema({"enum": ["x" * 300_000]}), "response_format.json_schema.schema", "limit of 262144"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-ahead"),
        ({"structured_outputs": {"grammar": "begin: x"}}, "structured_outputs.grammar", "no start rule"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]", "at least 1 character"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, json_object"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        (
            json_schema({"type": "object"}) | {"structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "not both",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "leave out ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens", "leave out min_tokens"),
        ({"modalities": ["text", "audio"]}, "modalities", "other than ['text']"),
        ({"audio": {"voice": "x"}}, "audio", "only text can be generated"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": "auto"}, "function_call", "use tool_choice"),
        ({"web_search_options": {}}, "web_search_options", "does not search"),
        ({"guided_regex": "a+"}, "guided_regex", "use structured_outputs.regex"),
        ({"regex": "a+"}, "regex", "use structured_outputs.regex"),
        ({"json_schema": {}}, "json_schema", "use response_format"),
        ({"use_beam_search": True}, "use_beam_search", "answers are sampled"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "use logprobs"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids", "use structured_outputs.choice"),
        ({"continue_final_message": True}, "continue_final_message", "a last message of the assistant"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "continue_final_message"),
        (
            {"tools": [called("f", {"type": "array"})], "tool_choice": "required"},
            "tools",
            "schema must be a JSON Schema of 'type: \"object\"'",
        ),
        (
            {
                "tools": [TOOL, called("g", {"type": "object", "properties": {"a b": {}}})],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
            "'a b' has a character",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "retrieval"}], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [called("f", nested(70))]}, "tools", "nesting depth of 128"),
        (json_schema(nested(70)), "response_format", "nesting depth of 128"),
        ({"thinking": {"type": "enabled", "a": nested(70)}}, "thinking", "nesting depth of 128"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g', which is not in tools",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "g"}}],
                    },
                },
            },
            "tool_choice",
            "'g', which is not in tools",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.allowed_tools",
            "required",
        ),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'minimal'"),
        ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs", "not ['colour']"),
    ],
)
def test_a_wrong_chat_field_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT | fields)

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": 5}, "prompt", "valid string, got 5"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": ["a", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [[1], "a"]}, "prompt[1]", "valid array"),
        ({"prompt": [5000]}, "prompt", "5000 is not a token id"),
        ({"prompt": [-1], "echo": True}, "prompt", "-1 is not a token id"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"best_of": 3}, "best_of", "must equal n (1)"),
        ({"suffix": "end"}, "suffix", "filling in the middle"),
        ({"logprobs": True}, "logprobs", "valid integer, got true"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ],
)
def test_a_wrong_completion_field_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = http.post("/v1/completions", json=PLAIN | fields)

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("value", [None, False, "", []])
def test_a_refused_field_that_asks_for_nothing_is_let_through(http: httpx.Client, value: object) -> None:
    assert http.post("/v1/chat/completions", json=CHAT | {"grammar": value}).status_code == 200


@pytest.mark.parametrize("value", [0, {}, "x", True])
def test_a_refused_field_that_asks_for_something_is_named(http: httpx.Client, value: object) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT | {"token_ids_logprob": value})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "token_ids_logprob"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": ', "not valid JSON: EOF while parsing"),
        (b'{"model": "v41-c"} trailing', "not valid JSON: trailing characters"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: recursion limit"),
        (b"[1, 2]", "must be a JSON object, got a list of 2"),
        (b"", "not valid JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    http: httpx.Client, path: str, body: bytes, message: str
) -> None:
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_missing_field_is_named(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={"model": "v41-c"})

    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "messages is required"


def test_numbers_must_be_finite(http: httpx.Client) -> None:
    body = b'{"model": "v41-c", "prompt": "Hello", "temperature": NaN}'

    answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "temperature: Input should be a finite number, got nan"


def test_other_content_types_are_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})

    assert answer.status_code == 415
    assert "application/json, got text/plain" in answer.json()["error"]["message"]


def test_a_prompt_beyond_the_context_raises_the_sdks_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="v41-c", prompt=[5] * 3000, stream=True)

    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 2048 tokens" in caught.value.message


def test_an_unknown_model_raises_the_sdks_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=CHAT["messages"])

    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "'gpt-9' does not exist; this server serves 'v41-c'" in caught.value.message


def test_an_unknown_route_is_a_404_in_the_same_shape(http: httpx.Client) -> None:
    answer = http.get("/v1/moderations")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "route_not_found"
    assert "there is no /v1/moderations" in answer.json()["error"]["message"]


def test_a_wrong_method_is_a_405_that_says_which_is_right(http: httpx.Client) -> None:
    answer = http.get("/v1/chat/completions")

    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "does not support GET" in answer.json()["error"]["message"]
