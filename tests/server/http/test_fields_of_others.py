"""Fields as other servers' clients send them mean what they mean there, or get a 400 that names them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from quant.errors import RequestError
from server.anthropic.requests import CountRequest, MessagesRequest
from server.native.requests import TokenizeRequest
from server.openai.completion_requests import CompletionRequest
from server.openai.messages import Body
from server.openai.refused import MESSAGES_REFUSED, RESPONSES_REFUSED, TOKENIZE_REFUSED, Refused
from server.openai.requests import ChatRequest
from server.responses.requests import ResponsesRequest

SAY = [{"role": "user", "content": "Answer in json."}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "v41-c", "messages": SAY, "max_tokens": 3, "reasoning_effort": "none"},
    "/v1/completions": {"model": "v41-c", "prompt": "Hi", "max_tokens": 3},
    "/v1/responses": {"model": "v41-c", "input": "Hi", "max_output_tokens": 3},
    "/v1/messages": {"model": "v41-c", "messages": SAY, "max_tokens": 3},
    "/tokenize": {"messages": SAY},
}
CHAT, COMPLETIONS, RESPONSES, MESSAGES, TOKENIZE = BODIES
TABLES: list[tuple[str, type[Body], Any]] = [
    (CHAT, ChatRequest, ChatRequest.refused),
    (COMPLETIONS, CompletionRequest, CompletionRequest.refused),
    (RESPONSES, ResponsesRequest, RESPONSES_REFUSED),
    (MESSAGES, MessagesRequest, MESSAGES_REFUSED),
    (MESSAGES, CountRequest, MESSAGES_REFUSED),
    (TOKENIZE, TokenizeRequest, TOKENIZE_REFUSED),
]
ROWS = [(path, kind, name, rule) for path, kind, table in TABLES for name, rule in table.items()]


@pytest.mark.parametrize(("path", "kind", "name", "rule"), ROWS)
def test_a_field_is_refused_by_name_unless_its_value_asks_for_nothing(
    path: str, kind: type[Body], name: str, rule: Refused
) -> None:
    body = BODIES[path]
    assert name not in kind.model_fields
    for value in rule.harmless:
        kind.model_validate(body | {name: value})
    for value in ("x", 7, {"a": 1}, ["x"], *({True, False} - {*map(_boolean, rule.harmless)})):
        with pytest.raises((RequestError, ValidationError)) as caught:
            kind.model_validate(body | {name: value})
        assert isinstance(caught.value, RequestError)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def _boolean(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


PENALTY = {"repetition_penalty": 1.2}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
JSON = {"type": "json_object", "schema": SCHEMA | {"additionalProperties": False}}
THINKS = {"type": "enabled", "budget_tokens": 1024}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        # llama.cpp's server
        (COMPLETIONS, {"n_predict": 8}, "n_predict"),
        (COMPLETIONS, {"n_predict": -1}, "n_predict"),
        (CHAT, {"repeat_penalty": 1.1}, "repeat_penalty"),
        (
            CHAT,
            {"repeat_penalty": 1.0, "repeat_last_n": 64, "typical_p": 1.0, "tfs_z": 1, "mirostat": 0},
            None,
        ),
        (CHAT, {"repeat_last_n": 64} | PENALTY, "repeat_last_n"),
        (CHAT, {"repeat_last_n": -1} | PENALTY, None),
        (CHAT, {"penalize_nl": False} | PENALTY, "penalize_nl"),
        (CHAT, {"penalize_nl": True, "penalty_last_n": 64}, None),
        (CHAT, {"n_cmpl": 2}, "n_cmpl"),
        (CHAT, {"parse_tool_calls": False}, "parse_tool_calls"),
        (CHAT, {"adaptive_target": -1.0, "adaptive_decay": 0.9, "n_cmpl": 1}, None),
        (CHAT, {"xtc_probability": 0.0, "dry_multiplier": 0.0, "dynatemp_range": 0.0, "min_keep": 0}, None),
        (CHAT, {"xtc_probability": 0.5, "xtc_threshold": 0.1}, "xtc_probability"),
        (CHAT, {"mirostat": 2, "mirostat_tau": 5.0}, "mirostat"),
        (COMPLETIONS, {"n_probs": 5}, "n_probs"),
        (COMPLETIONS, {"grammar": 'root ::= "a"'}, "grammar"),
        (COMPLETIONS, {"json_schema": SCHEMA}, "json_schema"),
        (COMPLETIONS, {"cache_prompt": True, "id_slot": -1, "n_keep": 0, "timings_per_token": True}, None),
        (COMPLETIONS, {"samplers": ["top_k", "temperature"]}, "samplers"),
        (CHAT, {"reasoning_format": "none"}, "reasoning_format"),
        (CHAT, {"reasoning_format": "auto"}, None),
        (CHAT, {"response_format": JSON}, None),
        (CHAT, {"response_format": JSON | {"type": "json_schema"}}, None),
        (CHAT, {"response_format": JSON | {"type": "text"}}, "response_format.type"),
        (COMPLETIONS, {"seed": -1, "top_k": 0, "max_tokens": 2}, None),
        # vLLM and SGLang
        (CHAT, {"guided_choice": ["a"]}, "guided_choice"),
        (
            CHAT,
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            CHAT,
            {"top_k": -1, "ignore_eos": True, "stop_token_ids": [5], "priority": 3, "min_tokens": 1},
            None,
        ),
        (CHAT, {"length_penalty": 1.0, "early_stopping": False, "use_beam_search": False}, None),
        (CHAT, {"use_beam_search": True}, "use_beam_search"),
        (CHAT, {"best_of": 2}, "best_of"),
        (CHAT, {"best_of": 1, "echo": False, "add_special_tokens": False}, None),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"add_special_tokens": True}, "add_special_tokens"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
        (CHAT, {"skip_special_tokens": True, "spaces_between_special_tokens": True}, None),
        (COMPLETIONS, {"skip_special_tokens": True, "spaces_between_special_tokens": True}, None),
        (COMPLETIONS, {"skip_special_tokens": "yes"}, "skip_special_tokens"),
        (CHAT, {"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        (CHAT, {"prompt_logprobs": 0}, None),
        (CHAT, {"return_token_ids": True}, "return_token_ids"),
        (CHAT, {"return_tokens_as_token_ids": True}, None),
        (CHAT, {"include_reasoning": False}, "include_reasoning"),
        (CHAT, {"include_reasoning": True, "separate_reasoning": True}, None),
        (CHAT, {"separate_reasoning": False}, "separate_reasoning"),
        (CHAT, {"chat_template": "{{ messages }}"}, "chat_template"),
        (CHAT, {"documents": [{"text": "a"}]}, "documents"),
        (CHAT, {"mm_processor_kwargs": {}, "kv_transfer_params": None}, None),
        (
            CHAT,
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            None,
        ),
        (CHAT, {"lora_path": "a"}, "lora_path"),
        (CHAT, {"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        (CHAT, {"sampling_params": {"temperature": 0}}, "sampling_params"),
        (CHAT, {"stream_reasoning": False}, "stream_reasoning"),
        (CHAT, {"stream_reasoning": True, "vllm_xargs": {}, "rid": "a", "cache_report": True}, None),
        (CHAT, {"input_ids": [5]}, "input_ids"),
        # Ollama
        (CHAT, {"truncate": False, "shift": False, "raw": False}, None),
        (CHAT, {"truncate": True}, "truncate"),
        (CHAT, {"raw": True}, "raw"),
        (COMPLETIONS, {"raw": True}, None),
        (CHAT, {"options": {"num_ctx": 4096}}, "options"),
        (CHAT, {"options": {}, "keep_alive": "5m", "format": ""}, None),
        (CHAT, {"num_ctx": 4096}, "num_ctx"),
        (CHAT, {"num_predict": 5}, "num_predict"),
        (CHAT, {"format": "json"}, "format"),
        (CHAT, {"format": SCHEMA}, "format"),
        (CHAT, {"think": False}, "think"),
        (CHAT, {"think": "low"}, "think"),
        (CHAT, {"system": "Be brief."}, "system"),
        (CHAT, {"messages": [SAY[0] | {"images": ["aGk="]}]}, "messages[0].images"),
        # OpenRouter, LM Studio, DashScope, Mistral, Hugging Face
        (CHAT, {"reasoning": {"effort": "low"}}, "reasoning"),
        (CHAT, {"enable_thinking": False}, "enable_thinking"),
        (CHAT, {"thinking_budget": 100}, "thinking_budget"),
        (CHAT, {"transforms": ["middle-out"]}, "transforms"),
        (
            CHAT,
            {"transforms": [], "provider": {}, "models": ["a"], "usage": {"include": True}, "ttl": 60},
            None,
        ),
        (CHAT, {"plugins": [{"id": "web"}]}, "plugins"),
        (CHAT, {"top_a": 0.2}, "top_a"),
        (CHAT, {"random_seed": 7}, "random_seed"),
        (CHAT, {"safe_prompt": True}, "safe_prompt"),
        (COMPLETIONS, {"max_new_tokens": 5}, "max_new_tokens"),
        (COMPLETIONS, {"do_sample": False}, "do_sample"),
        (COMPLETIONS, {"do_sample": True, "num_beams": 1}, None),
        # OpenAI
        (
            CHAT,
            {"temperature": None, "max_tokens": None, "max_completion_tokens": 2, "stop": None, "n": None},
            None,
        ),
        (CHAT, {"stop": []}, None),
        (CHAT, {"stop": ""}, None),
        (CHAT, {"stop": ["", "x"], "top_p": 0}, None),
        (CHAT, {"max_tokens": -1, "stop": "e"}, None),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": -2}, "max_tokens"),
        (CHAT, {"max_tokens": -1, "logit_bias": {"1": 100}}, None),
        (CHAT, {"logprobs": 5}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"top_logprobs": 5}, "top_logprobs"),
        (COMPLETIONS, {"max_completion_tokens": 5}, "max_completion_tokens"),
        (COMPLETIONS, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (COMPLETIONS, {"suffix": "end"}, "suffix"),
        (CHAT, {"stream_options": {}}, "stream_options"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"function_call": "auto"}, "function_call"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        (CHAT, {"thinking": THINKS}, "thinking.budget_tokens"),
        (CHAT, {"thinking": {"type": "on"}}, "thinking.type"),
        (CHAT, {"thinking": {}}, "thinking.type"),
        (CHAT, {"instructions": "Be brief."}, "instructions"),
        (CHAT, {"text": {"format": {"type": "json_object"}}}, "text"),
        (CHAT, {"text": {"format": {"type": "text"}}}, None),
        (CHAT, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"user": "u", "metadata": {}, "store": True, "service_tier": "auto", "prediction": {}}, None),
        (CHAT, {"modalities": ["text"], "audio": None, "parallel_tool_calls": True}, None),
        (RESPONSES, {"max_tokens": 5}, "max_tokens"),
        (RESPONSES, {"response_format": {"type": "json_object"}}, "response_format"),
        (RESPONSES, {"truncation": "auto"}, None),
        (RESPONSES, {"truncation": "disabled", "include": [], "background": False, "prompt": None}, None),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"prompt": {"id": "p"}}, "prompt"),
        (RESPONSES, {"reasoning": {"effort": "none", "summary": "auto"}}, None),
        (RESPONSES, {"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        (RESPONSES, {"reasoning": {"context": "current_turn", "effort": "low"}}, "reasoning.context"),
        (RESPONSES, {"reasoning": {"mode": "standard", "context": "auto", "effort": "none"}}, None),
        (RESPONSES, {"personality": "friendly"}, "personality"),
        (
            RESPONSES,
            {"tools": [{"type": "function", "name": "f", "allowed_callers": ["programmatic"]}]},
            "tools.allowed_callers",
        ),
        (RESPONSES, {"reasoning": {"max_tokens": 9}}, "reasoning.max_tokens"),
        (RESPONSES, {"text": {"format": {"type": "json_object", "schema": {}}}}, None),
        (RESPONSES, {"text": {"format": {"type": "text", "schema": {}}}}, "text.format.type"),
        (RESPONSES, {"top_k": -1, "seed": -1}, None),
        (RESPONSES, {"n": 2}, "n"),
        (RESPONSES, {"messages": SAY}, "messages"),
        (TOKENIZE, {"add_generation_prompt": False}, "add_generation_prompt"),
        (TOKENIZE, {"with_pieces": True}, None),
        (TOKENIZE, {"parse_special": True, "model": "x"}, None),
    ],
)
def test_what_other_clients_send(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str | None
) -> None:
    answer = http.post(path, json=BODIES[path] | fields)

    assert answer.status_code == (200 if param is None else 400), answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
        assert param.rpartition(".")[2] in answer.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"top_k": 5, "metadata": {"user_id": "u"}, "thinking": THINKS}, None),
        ({"thinking": THINKS | {"display": "omitted"}}, None),
        ({"thinking": THINKS | {"display": "full"}}, "thinking.display"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, "output_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"repeat_last_n": 64} | PENALTY, "repeat_last_n"),
        ({"mirostat": 1}, "mirostat"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"compaction": {"type": "summarize"}}, "compaction"),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 9}}}, "output_config.task_budget"),
        (
            {"tools": [{"name": "f", "input_schema": {}, "allowed_callers": ["code_execution"]}]},
            "tools.allowed_callers",
        ),
    ],
)
def test_what_other_clients_send_in_anthropics_protocol(
    http: httpx.Client, fields: dict[str, Any], named: str | None
) -> None:
    answer = http.post(MESSAGES, json=BODIES[MESSAGES] | fields)

    assert answer.status_code == (200 if named is None else 400), answer.text
    assert named is None or answer.json()["error"]["message"].startswith(named)


def test_seed_minus_one_draws_a_new_one(http: httpx.Client) -> None:
    body = BODIES[COMPLETIONS] | {"max_tokens": 20, "seed": -1, "temperature": 2}

    assert len({http.post(COMPLETIONS, json=body).json()["choices"][0]["text"] for _ in range(4)}) > 1


def test_max_tokens_minus_one_is_what_the_context_holds(http: httpx.Client) -> None:
    body = {"model": "v41-c", "prompt": [5] * 2000, "max_tokens": -1, "ignore_eos": True}

    answer = http.post(COMPLETIONS, json=body).json()

    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 2048


def test_a_schema_beside_json_object_binds_the_answer(http: httpx.Client) -> None:
    for kind in ("json_object", "json_schema"):
        body = BODIES[CHAT] | {"response_format": JSON | {"type": kind}, "max_tokens": 200}

        (choice,) = http.post(CHAT, json=body).json()["choices"]

        assert httpx.Response(200, text=choice["message"]["content"]).json() == {"a": 1}


def test_special_tokens_are_no_text_where_they_are_to_be_skipped(http: httpx.Client) -> None:
    body = BODIES[COMPLETIONS] | {"ignore_eos": True, "logit_bias": {"1": 100}}

    def text(**fields: Any) -> str:
        return str(http.post(COMPLETIONS, json=body | fields).json()["choices"][0]["text"])

    assert text(skip_special_tokens=True) == ""
    assert text() == text(skip_special_tokens=False) != ""


def test_strict_tools_of_anthropics_protocol_are_bound() -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}, "strict": True}
    request = MessagesRequest.model_validate(BODIES[MESSAGES] | {"tools": [tool]})

    assert [tool.function.strict for tool in request.as_chat().tools or ()] == [True]


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_reasoning_in_a_message_may_have_its_other_names(name: str) -> None:
    said = {"role": "assistant", "content": "a", name: "b"}
    request = ChatRequest.model_validate(BODIES[CHAT] | {"messages": [*SAY, said]})

    assert request.as_prompt()["messages"][1] == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "b",
    }


def test_a_refusal_in_the_history_is_what_the_assistant_said() -> None:
    said = {"role": "assistant", "content": None, "refusal": "I will not."}
    request = ChatRequest.model_validate(BODIES[CHAT] | {"messages": [*SAY, said]})

    assert request.as_prompt()["messages"][1] == {"role": "assistant", "content": "I will not."}
