"""Templates without a place for tools: definitions, calls and results become text that any model reads."""

from __future__ import annotations

from typing import Any

import pytest

from engine.chat.output_parser import MessageDelta
from engine.chat.template import TemplateChat
from tests.engine.chat.test_template import CHATML, TOKENIZER, render

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": None,
    },
}
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
)
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "dry"},
    {"role": "user", "content": "And tomorrow?"},
]


def test_the_system_message_describes_the_tools() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]

    prompt = render(CHATML, {"messages": messages, "tools": [WEATHER]})

    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call tools.")
    assert (
        '<tools>\n{"name": "weather", "description": "The weather of a city", "parameters": {"type": '
        '"object", "properties": {"city": {"type": "string"}}}}\n</tools>'
    ) in prompt
    assert prompt.endswith("<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_without_system_messages_has_them_with_the_first_question() -> None:
    prompt = render(ALTERNATING, {"messages": TURNS, "tools": [WEATHER]})

    assert prompt.startswith("[You can call tools.")
    assert "\n\nRain?][Let me look.\n<tool_call>" in prompt


@pytest.mark.parametrize("tools", [[WEATHER], None])
def test_calls_and_results_of_the_history_are_text(tools: Any) -> None:
    prompt = render(CHATML, {"messages": TURNS, "tools": tools})

    assert prompt.endswith(
        "<|im_start|>assistant\nLet me look.\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response>\nAnd tomorrow?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_what_the_model_writes_so_is_a_call() -> None:
    request = {"messages": TURNS[:1], "tools": [WEATHER]}
    parser = TemplateChat(TOKENIZER, CHATML).render(request).new_parser()

    text = 'Hm.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    deltas = [*parser.push(text), *parser.finish()]

    calls = [call for delta in deltas for call in delta.tool_calls]
    assert "".join(delta.content for delta in deltas) == "Hm."
    assert [call.name for call in calls if call.name] == ["weather"]
    assert "".join(call.arguments for call in calls) == '{"city": "Oslo"}'
    assert parser.has_tool_calls


def test_an_answer_without_tools_is_plain() -> None:
    parser = TemplateChat(TOKENIZER, CHATML).render({"messages": TURNS}).new_parser()

    assert parser.push("<tool_call>") + parser.finish() == [MessageDelta(content="<tool_call>")]


def test_calls_are_bound_to_the_schemas_even_where_the_model_may_choose() -> None:
    request = {"messages": TURNS[:1], "tools": [WEATHER]}

    assert TemplateChat(TOKENIZER, CHATML).render(request).grammar is not None
    assert TemplateChat(TOKENIZER, CHATML).render(request | {"tool_choice": "none"}).grammar is None
