"""DeepSeek V3.2 without a template of its own: its prompts as the release describes them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.chat.registry import chat_format_for
from engine.tokenizer.tokenizer import Tokenizer
from tests.engine.grammar.test_tools import tiny_tokenizer

TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
HELLO: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "reasoning_content": "Hm.", "content": "Hi!"},
    {"role": "user", "content": "1+1=?"},
]
CALL = {"function": {"name": "add", "arguments": '{"a": 1, "note": "é <"}'}, "id": "c", "type": "function"}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "reasoning_content": "Add.", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "2"},
    {"role": "tool", "tool_call_id": "c", "content": "2"},
]
INVOKE = (
    '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="note" string="true">é <</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer(*TOKENS)


def rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], **more: Any) -> str:
    chat = chat_format_for("deepseek_v32", {}, tokenizer)
    assert chat is not None
    return tokenizer.decode(chat.render({"messages": messages, **more}).token_ids)


def test_only_the_last_question_is_thought_about(tokenizer: Tokenizer) -> None:
    asked = (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>hello<｜Assistant｜></think>Hi!<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜>"
    )

    assert rendered(tokenizer, HELLO) == f"{asked}<think>"
    assert rendered(tokenizer, HELLO, reasoning_effort="none") == f"{asked}</think>"


def test_reasoning_before_calls_is_kept_until_the_next_question(tokenizer: Tokenizer) -> None:
    calls = f"\n\n<｜DSML｜function_calls>\n{INVOKE}{INVOKE}</｜DSML｜function_calls><｜end▁of▁sentence｜>"
    results = "\n\n<function_results>\n<result>2</result>\n<result>2</result>\n</function_results>\n\n"

    asked = "<｜begin▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜>"
    assert rendered(tokenizer, CALLED) == f"{asked}<think>Add.</think>{calls}{results}<think>"
    again = [*CALLED, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Sure?"}]
    assert rendered(tokenizer, again) == (
        f"{asked}</think>{calls}{results}</think>Two.<｜end▁of▁sentence｜><｜User｜>Sure?<｜Assistant｜><think>"
    )


def test_answers_begin_inside_reasoning(tokenizer: Tokenizer) -> None:
    chat = chat_format_for("deepseek_v32", {}, tokenizer)
    assert chat is not None
    parser = chat.render({"messages": HELLO}).new_parser()

    deltas = parser.push("Hm.</think>Two.") + parser.finish()
    assert [(delta.reasoning, delta.content) for delta in deltas] == [("Hm.", ""), ("", "Two.")]


def test_tools_are_taught_in_a_spelling_of_ours(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    assert '<tools>\n{"name": "add"}\n</tools>' in rendered(tokenizer, HELLO, tools=tools)
