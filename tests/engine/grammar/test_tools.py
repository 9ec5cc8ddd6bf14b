"""Calls that a grammar lets through are calls that the output parsers read, with the right arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jsonschema_rs
import pytest
import tokenizers

from engine.chat.deepseek import DeepseekChat
from engine.chat.dialects import calls_of
from engine.chat.format import ChatFormat
from engine.chat.harmony import TAGS
from engine.chat.template import TemplateChat
from engine.grammar.call_spellings import DSML
from engine.grammar.constraint import GrammarCompiler
from engine.grammar.tools import string_part
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import RequestError
from tests.conftest import golden_path
from tests.engine.chat.transcripts import TEMPLATES
from tests.engine.grammar.random_answers import random_answer

END = 1
KIMI_TAGS = calls_of(TEMPLATES["Kimi-K2"]).form.tags  # type: ignore[union-attr]
FORCED = {"tool_choice": "required"}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where?"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F", 3, None]},
        "code": {"type": "string", "pattern": "^[a-f]{3}$"},
        "flags": {"type": "array", "items": {"$ref": "#/$defs/flag"}, "maxItems": 2},
        "note": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
    },
    "required": ["city", "code"],
    "$defs": {"flag": {"type": "boolean"}},
}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "size/kind": {"enum": ["big", 7]},
        "same~": {"$ref": "#/properties/size~1kind"},
        "more": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        "é": {"$ref": "#/definitions/%C3%A9"},
        "mark": {"$ref": "#/properties/own/$defs/mark"},
        "own": {"$ref": "#mark", "$defs": {"mark": {"$anchor": "mark", "type": "integer", "maximum": 9}}},
    },
    "required": ["same~", "mark", "own"],
    "definitions": {"é": {"type": "boolean"}},
}
SCHEMAS: dict[str, dict[str, Any] | None] = {
    "weather": WEATHER,
    "tree": TREE,
    "now": None,
    "anything": {"type": "object", "additionalProperties": {"type": ["boolean", "string"]}},
}
# Qwen's and Hermes' spelling, with reasoning that the model may open.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if tools %}Write <tool_call> before and </tool_call> behind calls.{% endif %}"
)
THINKING = TEMPLATE + "<think></think>{% if enable_thinking %}<think>{% endif %}"


def tool(name: str, strict: bool = True) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name, "strict": strict}
    if SCHEMAS[name] is not None:
        function["parameters"] = SCHEMAS[name]
    return {"type": "function", "function": function}


def tiny_tokenizer(*added: str) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(golden_path("v41-c") / "tokenizer.json"))
    backend.add_special_tokens(list(added))
    return Tokenizer(backend, bos_token_id=0, add_bos=True, eos_token_id=END)


@dataclass(frozen=True)
class Dialect:
    """A chat format with its compiler and what the texts of its answers end with."""

    chat: ChatFormat
    tokenizer: Tokenizer
    compiler: GrammarCompiler
    closers: Sequence[str]

    def answer(self, seed: int, **request: Any) -> tuple[str, str, list[tuple[str, Any]]]:
        """(reasoning, content, calls as name and arguments) of a random answer."""
        body = {
            "messages": [{"role": "user", "content": "Hi, json"}],
            "tools": [*map(tool, SCHEMAS)],
            **request,
        }
        prompt = self.chat.render(body)
        assert prompt.grammar is not None
        text = random_answer(self.compiler, self.tokenizer, prompt.grammar, seed, self.closers)
        parser = prompt.new_parser()
        deltas = parser.push(text) + parser.finish()
        calls: list[list[str]] = []
        for piece in (piece for delta in deltas for piece in delta.tool_calls):
            if piece.index == len(calls):
                calls.append([piece.name or "", ""])
            calls[piece.index][1] += piece.arguments
        content = "".join(delta.content for delta in deltas)
        reasoning = "".join(delta.reasoning for delta in deltas)
        return reasoning, content, [(name, json.loads(arguments)) for name, arguments in calls]


def deepseek(model_type: str, *added: str) -> Dialect:
    tokenizer = tiny_tokenizer(*added)
    gap = " " if model_type == "deepseek_v41" else ""
    closers = ['"', f"</｜DSML｜{gap}parameter>\n", "</think>"]
    chat = DeepseekChat(tokenizer, model_type)
    return Dialect(chat, tokenizer, GrammarCompiler(tokenizer, (END,), tokenizer.size), closers)


def tagged(template: str, *added: str) -> Dialect:
    tokenizer = tiny_tokenizer(*added)
    compiler = GrammarCompiler(tokenizer, (END,), tokenizer.size)
    return Dialect(TemplateChat(tokenizer, template), tokenizer, compiler, ['"', "</think>"])


SPELLED = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{% endif %}{# PATTERN #}"


# What values and reasoning end with, and what of a template tells where they do.
ENDS = {
    "[/THINK]": ["[THINK]"],
    "\n</parameter>\n": ["<parameter=", "<minimax:"],
    "</arg_value>\n": ["<arg_value>"],
    f"</{DSML}parameter>\n": [DSML],
    "<|end|><|start|>assistant": ["<|channel|>"],
}


def spelled(family: str, *added: str) -> Dialect:
    """The dialect of a family, told by the markers in its template."""
    subject = tagged(SPELLED.replace("PATTERN", TEMPLATES[family].replace("<think></think>", "")), *added)
    ends = [end for end in ENDS if any(part in TEMPLATES[family] for part in ENDS[end])]
    return replace(subject, closers=['"', *ends])


DIALECTS = {
    "V4.1": lambda: deepseek("deepseek_v41", "<｜System｜>", "｜DSML｜"),
    "V4.1, tag without a token": lambda: deepseek("deepseek_v41"),
    "V4": lambda: deepseek("deepseek_v4", "｜DSML｜"),
    "tagged": lambda: tagged(TEMPLATE),
    "tagged, with tokens": lambda: tagged(TEMPLATE, "<tool_call>", "</tool_call>"),
    "tagged, reasoning": lambda: tagged(THINKING),
}
FAMILIES: dict[str, Callable[[], Dialect]] = {
    **{family: partial(spelled, family) for family in TEMPLATES if family != "Qwen3"},
    "gpt-oss, with tokens": lambda: spelled("gpt-oss", *TAGS),
    "Kimi-K2, with tokens": lambda: spelled("Kimi-K2", *KIMI_TAGS),
    "GLM-4.5, with tokens": lambda: spelled("GLM-4.5", "<tool_call>", "</tool_call>", "<arg_key>"),
}


@pytest.fixture(scope="module", params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Dialect:
    return FAMILIES[request.param]()


@pytest.mark.parametrize("effort", ["none", "high"])
@pytest.mark.parametrize("seed", range(6))
def test_forced_calls_are_read_and_follow_their_schemas(dialect: Dialect, effort: str, seed: int) -> None:
    check_forced_calls(dialect, seed, effort)


@pytest.mark.parametrize("seed", range(4))
def test_calls_forced_in_each_familys_spelling_are_read(family: Dialect, seed: int) -> None:
    check_forced_calls(family, seed)


def check_forced_calls(dialect: Dialect, seed: int, effort: str = "none") -> None:
    _, content, calls = dialect.answer(seed, **FORCED, reasoning_effort=effort)

    assert content == ""
    assert calls
    for name, arguments in calls:
        schema = SCHEMAS[name] or {"maxProperties": 0}
        assert jsonschema_rs.is_valid(schema, arguments), (name, arguments)
        assert name != "weather" or arguments.keys() <= WEATHER["properties"].keys()


@pytest.mark.parametrize("seed", range(4))
def test_a_named_function_is_called_once(dialect: Dialect, seed: int) -> None:
    named = {"type": "function", "function": {"name": "weather"}}

    _, _, calls = dialect.answer(seed, tool_choice=named)

    assert [name for name, _ in calls] == ["weather"]


@pytest.mark.parametrize("seed", range(4))
def test_without_parallel_calls_there_is_one(dialect: Dialect, seed: int) -> None:
    _, _, calls = dialect.answer(seed, **FORCED, parallel_tool_calls=False)

    assert len(calls) == 1


def test_strict_tools_may_be_called_or_not(dialect: Dialect) -> None:
    check_free_calls(dialect)


def test_strict_tools_may_be_called_or_not_in_each_familys_spelling(family: Dialect) -> None:
    check_free_calls(family)


def check_free_calls(dialect: Dialect) -> None:
    answers = [dialect.answer(seed, reasoning_effort="none", tools=[tool("now")]) for seed in range(30)]

    assert all(calls == [("now", {})] * len(calls) for _, _, calls in answers)
    assert any(content for _, content, _ in answers)


def test_content_by_schema_may_give_way_to_a_call(dialect: Dialect) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}},
    }

    answers = [dialect.answer(seed, response_format=form, tools=[tool("now")]) for seed in range(12)]

    assert all(calls or json.loads(content).keys() == {"a"} for _, content, calls in answers)
    assert any(calls for _, _, calls in answers)
    assert not all(calls for _, _, calls in answers)


def test_tools_that_are_not_strict_leave_an_answer_free(dialect: Dialect) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool("weather", strict=False)]}

    assert dialect.chat.render(body).grammar is None
    assert dialect.chat.render(body | {"tool_choice": "none"} | FORCED).grammar is not None


def test_reasoning_is_free_and_the_form_comes_behind_it() -> None:
    request = {
        "structured_outputs": {"regex": "[0-9]{2}"},
        "tools": [],
        "chat_template_kwargs": {"enable_thinking": True},
    }
    for dialect in (deepseek("deepseek_v41"), tagged(THINKING)):
        answers = [dialect.answer(seed, **request) for seed in range(8)]

        assert all(re.fullmatch("\n*[0-9]{2}", content) for _, content, _ in answers)
        assert any(reasoning for reasoning, _, _ in answers)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "object", "properties": {"a b": {}}}, "'a b' has a character"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "'minProperties'"),
        ({"type": "object", "properties": {"a": {}}, "anyOf": [{}]}, "'anyOf'"),
    ],
)
def test_what_deepseeks_calls_cannot_carry_is_refused(parameters: dict[str, Any], message: str) -> None:
    function = {"name": "f", "parameters": parameters, "strict": True}

    with pytest.raises(RequestError, match=message) as caught:
        deepseek("deepseek_v41").answer(0, **FORCED, tools=[{"type": "function", "function": function}])

    assert caught.value.param in ("tools[0].function.parameters", "tools")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"format": "date"}, "'format'.* cannot be enforced"),
        ({"maxLength": 5000}, "a length of more than 1000"),
    ],
)
def test_text_that_nothing_marks_as_a_string_can_only_be_limited_as_text(
    limit: dict[str, Any], message: str
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", **limit}}, "required": ["a"]}
    function = {"name": "f", "parameters": parameters}
    subject = spelled("Qwen3-Coder, Qwen3.5")

    with pytest.raises(RequestError, match=message):
        subject.answer(0, **FORCED, tools=[{"type": "function", "function": function | {"strict": True}}])
    _, _, calls = subject.answer(0, **FORCED, tools=[{"type": "function", "function": function}])
    assert calls[0][1].keys() == {"a"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name", ["Qwen3-Coder, Qwen3.5", "GLM-4.7, GLM-5", "GLM-4.5, with tokens", "MiniMax-M2"]
)
def test_text_is_limited_by_patterns_and_lengths(name: str, seed: int) -> None:
    limits: tuple[dict[str, Any], ...] = (
        {"pattern": "^a"},
        {"pattern": "[0-9]$", "maxLength": 9},
        {"minLength": 2, "maxLength": 4},
    )
    properties = {key: {"type": "string", **limit} for key, limit in zip("xyz", limits, strict=True)}
    parameters = {"type": "object", "properties": properties, "required": [*"xyz"]}
    function = {"name": "f", "parameters": parameters, "strict": True}

    _, _, calls = FAMILIES[name]().answer(seed, **FORCED, tools=[{"type": "function", "function": function}])

    assert all(jsonschema_rs.is_valid(parameters, arguments) for _, arguments in calls)


@pytest.mark.parametrize("seed", range(4))
def test_what_gpt_oss_answers_has_its_form_in_the_last_message(seed: int) -> None:
    subject = spelled("gpt-oss", *TAGS)

    _, content, calls = subject.answer(seed, structured_outputs={"regex": "[0-9]{2}"}, tools=[])

    assert re.fullmatch("[0-9]{2}", content)
    assert calls == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "{{ tools }}{{ messages[0].content }}"], ids=["none", "unknown"]
)
def test_a_template_that_teaches_no_calls_we_read_is_taught_them(template: str, seed: int) -> None:
    _, content, calls = tagged(template).answer(seed, **FORCED)

    assert content == ""
    assert calls
    assert {name for name, _ in calls} <= SCHEMAS.keys()


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "string"}, ([], False)),
        ({"type": "string", "title": "T", "default": "x"}, ([], False)),
        ({"type": ["string", "null"]}, ([], True)),
        ({"type": "integer"}, (None, True)),
        ({"enum": ["a", "b"]}, (["a", "b"], False)),
        ({"enum": ["a", 1]}, (["a"], True)),
        ({"const": "a", "type": "string"}, (["a"], False)),
        ({"type": "string", "maxLength": 3}, (None, True)),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ([], True)),
        ({}, ([], True)),
        (True, ([], True)),
    ],
)
def test_strings_stand_as_text_where_nothing_else_limits_them(
    schema: Any, part: tuple[list[str] | None, bool]
) -> None:
    assert string_part(schema) == part
