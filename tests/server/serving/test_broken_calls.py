"""Arguments that are no JSON object come back in histories; the conversation goes on, in every protocol."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.chat.format import ChatFormat
from engine.chat.template import TemplateChat
from engine.families.loader import load
from engine.tokenizer.tokenizer import Tokenizer
from server.anthropic.requests import MessagesRequest
from server.openai.requests import ChatRequest
from server.responses.requests import ResponsesRequest
from tests.server.harness import TINY

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}"
)
LOADED = load(TINY)
BROKEN = ["{", '{"a": "x', "[1]", "3", '"Paris"', "oops", '{"a": 1} and more']


def chats() -> dict[str, ChatFormat]:
    assert LOADED.chat is not None
    return {"deepseek": LOADED.chat, "template": TemplateChat(LOADED.tokenizer, TEMPLATE)}


def in_chat_completions(arguments: Any) -> ChatRequest:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "wrong"},
    ]
    return ChatRequest.model_validate({"model": "m", "messages": messages})


def in_responses(arguments: Any) -> ChatRequest:
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": "wrong"},
    ]
    return ResponsesRequest.model_validate({"model": "m", "input": items}).as_chat()


def in_messages(arguments: Any) -> ChatRequest:
    call = {"type": "tool_use", "id": "c", "name": "f", "input": arguments}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "wrong"}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": messages}).as_chat()


def prompt(chat: ChatFormat, tokenizer: Tokenizer, request: ChatRequest) -> str:
    return tokenizer.decode(chat.render(request.as_prompt()).token_ids)


@pytest.mark.parametrize("protocol", [in_chat_completions, in_responses, in_messages])
@pytest.mark.parametrize("dialect", ["deepseek", "template"])
@pytest.mark.parametrize("arguments", BROKEN)
def test_a_history_with_broken_arguments_is_answered(protocol: Any, dialect: str, arguments: str) -> None:
    assert arguments in prompt(chats()[dialect], LOADED.tokenizer, protocol(arguments))


@pytest.mark.parametrize("protocol", [in_chat_completions, in_responses, in_messages])
def test_arguments_may_be_the_object_that_their_text_stands_for(protocol: Any) -> None:
    given = {"city": "Köln", "days": [1, 2.5, None], "more": {"deep": True}}

    for chat in chats().values():
        as_object, as_text = protocol(given), protocol(json.dumps(given))
        assert chat.render(as_object.as_prompt()).token_ids == chat.render(as_text.as_prompt()).token_ids


@pytest.mark.parametrize("value", [[1], 3, "oops", False])
def test_an_input_that_is_no_object_is_answered(value: Any) -> None:
    for chat in chats().values():
        assert str(value).lower() in prompt(chat, LOADED.tokenizer, in_messages(value))
