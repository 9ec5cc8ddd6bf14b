"""What the tests of vLLM's server ask of tools' calls and of the tokenizer."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs

from tests.clients.others.checks import CHAT, PLAIN, SAY, Asked
from tests.clients.others.vllm import VLLM, choice_of

CALLS, TOKENS = "chat_completion/test_completion_with_function_calling.py", "test_tokenization.py"
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Vienna", "Berlin"], "default": "Vienna"},
        "unit": UNIT,
        "options": {"$ref": "#/$defs/Options"},
    },
    "required": ["city", "unit"],
    "$defs": {
        "Options": {"type": "object", "additionalProperties": False, "properties": {"unit": UNIT}},
    },
}
TOOLS = [{"type": "function", "function": {"name": "get_current_weather", "parameters": WEATHER}}]
NAMED = {"type": "function", "function": {"name": "get_current_weather"}}


@VLLM.test(CALLS, "test_function_tool_use", note="`tool_choice` other than `auto`: the model is untrained")
@VLLM.test(CALLS, "test_named_tool_use")
def _calls(ask: Asked) -> None:
    for wanted in ("required", NAMED):
        body = PLAIN | {"tools": TOOLS, "tool_choice": wanted, "max_tokens": 600}
        calls = choice_of(ask, **body)["message"]["tool_calls"]
        pieces = [
            call["function"].get("arguments", "")
            for event in ask.events(CHAT, **body, parallel_tool_calls=False)
            for call in event["choices"][0]["delta"].get("tool_calls", ())
        ]
        for arguments in (calls[0]["function"]["arguments"], "".join(pieces)):
            jsonschema_rs.validate(WEATHER, json.loads(arguments))


@VLLM.test(CALLS, "test_no_args_tool_call")
def _no_arguments(ask: Asked) -> None:
    function = {
        "name": "get_current_time",
        "parameters": {"type": "object", "properties": {}, "required": []},
    }
    for arguments in ("{}", ""):
        call = {
            "id": "a",
            "type": "function",
            "function": {"name": "get_current_time", "arguments": arguments},
        }
        turns = [
            *SAY,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "noon"},
        ]
        tools = [{"type": "function", "function": function}]
        assert choice_of(ask, **PLAIN | {"messages": turns}, tools=tools)["message"]["content"] is not None


@VLLM.test(CALLS, "test_inconsistent_tool_choice_and_tools")
def _wrong_choices(ask: Asked) -> None:
    other = {"type": "function", "function": {"name": "nondefined_function_name"}}
    ask.refused(CHAT, **PLAIN, tool_choice=NAMED)
    ask.refused(CHAT, **PLAIN, tools=TOOLS, tool_choice=other)
    ask.refused(CHAT, **PLAIN, tools=TOOLS, tool_choice={})


@VLLM.test(CALLS, "test_max_tokens_with_tool_choice_required")
def _cut_call(ask: Asked) -> None:
    for wanted in ("required", NAMED):
        choice = choice_of(ask, **PLAIN | {"tools": TOOLS, "tool_choice": wanted, "max_tokens": 1})
        assert choice["finish_reason"] == "length"
        assert not choice["message"].get("tool_calls")


@VLLM.test(TOKENS, "test_tokenize_completions", "test_tokenize_with_return_token_strs", "test_detokenize")
def _tokens(ask: Asked) -> None:
    text = "This is a test prompt."
    bare, begun = (ask.post("/tokenize", prompt=text, add_special_tokens=each) for each in (False, True))
    assert begun["tokens"][-bare["count"] :] == bare["tokens"]
    assert (bare["count"], bare["max_model_len"]) == (len(bare["tokens"]), 2048)
    assert "token_strs" not in bare
    named = ask.post("/tokenize", prompt=text, return_token_strs=True)
    assert len(named["token_strs"]) == named["count"] == begun["count"]
    assert ask.post("/detokenize", tokens=bare["tokens"])["prompt"] == text


@VLLM.test(
    TOKENS, "test_tokenize_chat", "test_tokenize_chat_with_tools", note="as a chat's prompt is counted"
)
def _chat_tokens(ask: Asked) -> None:
    for tools in ([], TOOLS):
        count = ask.post("/tokenize", messages=SAY, tools=tools)["count"]
        thinking = {"messages": SAY, "max_tokens": 1, "tools": tools}
        assert count == ask.post(CHAT, **thinking)["usage"]["prompt_tokens"]


@VLLM.test(
    TOKENS,
    "test_tokenizer_info_basic",
    "test_tokenizer_info_schema",
    "test_tokenizer_info_added_tokens_structure",
    "test_tokenizer_info_consistency_with_tokenize",
    "test_tokenizer_info_chat_template",
)
def _tokenizer(ask: Asked) -> None:
    told = ask.get("/tokenizer_info")
    assert told["tokenizer_class"]
    kinds = {"bos_token": str, "eos_token": str, "model_max_length": int, "added_tokens_decoder": dict}
    assert all(isinstance(told[name], kind) for name, kind in kinds.items() if name in told)
    assert all(isinstance(token["special"], bool) for token in told["added_tokens_decoder"].values())
    assert told["model_max_length"] >= ask.post("/tokenize", prompt="Hello")["max_model_len"]
    assert told["chat_template"] is None or told["chat_template"].strip()
