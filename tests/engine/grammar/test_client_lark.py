"""Custom tools whose input follows a Lark grammar or a pattern: every spelling of calls holds to it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import llguidance
import pytest

from engine.grammar.client_lark import quoted_lark
from engine.grammar.constraint import GrammarCompiler
from engine.grammar.lark import GrammarWriter
from quant.errors import RequestError
from server.openai.tools import custom_function
from tests.engine.grammar.test_tools import DIALECTS, FAMILIES, Dialect

FORCED: dict[str, Any] = {"tool_choice": "required"}
PATCH = r"""
start: begin change+ end
begin: "*** Start" LF
change: "@@ " name LF line~1..2
?name: /[a-z"<\\]{1,4}/
line: ("+" | "-"i) /.{0,3}/ LF -> edited
end: "*** Stop" LF?   // the last line may lack its end
%import common.LF
"""
PATCHES = re.compile(r'\*\*\* Start\r?\n(@@ [a-z"<\\]{1,4}\r?\n([+-].{0,3}\r?\n){1,2})+\*\*\* Stop(\r?\n)?')
SUMS = """
start: sum
sum: INT | "(" sum "+" sum ")"
%import common.INT
"""


def custom(syntax: str, definition: str) -> dict[str, Any]:
    format_ = {"type": "grammar", "syntax": syntax, "definition": definition}
    function = custom_function({"name": "write", "format": format_}, "tools[0].custom")
    return {"type": "function", "function": {name: value for name, value in function.items() if value}}


def inputs_of(
    dialect: Dialect, definition: str, syntax: str = "lark", answers: int = 3, **request: Any
) -> list[str]:
    given = [
        dialect.answer(seed, tools=[custom(syntax, definition)], reasoning_effort="none", **request)
        for seed in range(answers)
    ]
    return [arguments["input"] for _, _, calls in given for _, arguments in calls]


@pytest.mark.parametrize("name", ["V4.1", "V4.1, tag without a token", "tagged", *FAMILIES])
def test_calls_follow_the_grammar_of_their_tool(name: str) -> None:
    dialect = (DIALECTS | FAMILIES)[name]()

    written = inputs_of(dialect, PATCH, parallel_tool_calls=False, **FORCED)

    assert len(written) == 3
    assert all(map(PATCHES.fullmatch, written)), written
    assert all(map(re.compile(r'"[a-f]+"\n').fullmatch, inputs_of(dialect, r'"[a-f]+"\n', "regex", **FORCED)))


def test_without_a_choice_calls_follow_it_too() -> None:
    dialect = replace(DIALECTS["tagged, with tokens"](), closers=['"', "<tool_call>"])

    written = inputs_of(dialect, PATCH, answers=20)

    assert written
    assert all(map(PATCHES.fullmatch, written))


def test_grammars_that_refer_to_themselves_are_enforced_in_json_and_refused_in_text() -> None:
    written = inputs_of(DIALECTS["tagged"](), SUMS, parallel_tool_calls=False, **FORCED)
    assert all(re.fullmatch(r"[0-9+()]+", text) for text in written)

    with pytest.raises(RequestError, match="the rule sum, which refers to itself,"):
        inputs_of(FAMILIES["Qwen3-Coder, Qwen3.5"](), SUMS, **FORCED)


def follows(grammar: str, text: str) -> bool:
    """Whether `text`, as JSON has it, follows a grammar."""
    writer = GrammarWriter({})
    whole = writer.finished(f'"\\"" {writer.quoted_lark(grammar, "f")} "\\""').text
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), whole, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    written = json.dumps(text, ensure_ascii=False).encode()
    return bool(matcher.try_consume_tokens(list(written)) == len(written) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("grammar", "taken", "refused"),
    [
        (r"start: /[^a-z]+\t?/", 'A\\"B\n', "a"),
        ('start: "a".."f" " ".."~"', 'b"', "g "),
        (r'start: /(?i:ab)\n"x"/', 'aB\n"x"', 'aB\n"X"'),
        (r'start: "Q\n\""i', 'q\n"', "q\\n"),
        ("start: /(?s).{3}/", "a\nb", "ab"),
        ("start: /.{3}/", 'a"b', "a\nb"),
        (r"start: /\s+\w\W\d/", " \t\nx\n3", "x\n3"),
        (r'start: /[\]"\\\/]+/', ']"\\/', "]["),
        (r"start: /a\x0ab\u{22}/", 'a\nb"', "a\nb"),
        ('start: a-b [WS]\na-b: "ü" INT\n%import common (INT, WS)', "ü3\n ", "ü"),
        ('start: STR\n%import common.ESCAPED_STRING -> STR # a string', '"a\\"b"', '"'),
    ],
)  # fmt: skip
def test_in_a_json_string_the_same_texts_are_taken(grammar: str, taken: str, refused: str) -> None:
    assert follows(grammar, taken)
    assert not follows(grammar, refused)


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (r"start: /\p{L}/", r"\p"),
        ("start: <|im_end|>", "'<|im_end|>'"),
        ('start: ~"a"', "~"),
        ('start: %json {"a": 1}', "'%json'"),
        ("start: /[a&&b]/", "[a&&b]"),
        ("start: /(?x) a/", "flag x"),
        ("start: /a/x", "flag x"),
        (r'start: "\q"', r'"\q"'),
        (r'start: /a+"?/ ("\n" start)?', "the rule start, which refers to itself,"),
        ("start: /./\n%ignore /[ \\n]+/", "%ignore"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(grammar: str, named: str) -> None:
    with pytest.raises(RequestError, match=r"^tools\[0\].custom.format: ") as error:
        quoted_lark(grammar, "tools[0].custom.format")

    assert named in str(error.value)


def test_mistakes_of_a_grammar_are_told_of_the_tool() -> None:
    dialect = DIALECTS["tagged"]()
    for syntax, definition in (("lark", "start: missing"), ("lark", "start: /(?=a)b/"), ("regex", "[a")):
        request = {"tools": [custom(syntax, definition)], "messages": [{"role": "user", "content": "Hi"}]}
        grammar = dialect.chat.render(request | FORCED).grammar
        assert grammar is not None
        compiler: GrammarCompiler = dialect.compiler
        with pytest.raises(RequestError) as error:
            compiler.start(grammar)
        assert str(error.value.param).startswith("tools[0].")


@pytest.mark.parametrize(
    ("format_", "param"),
    [
        ("lark", "tools[2].custom.format.type"),
        ({"type": "json"}, "tools[2].custom.format.type"),
        ({"type": "grammar"}, "tools[2].custom.format.syntax"),
        ({"type": "grammar", "grammar": {"syntax": "gbnf"}}, "tools[2].custom.format.grammar.syntax"),
        ({"type": "grammar", "syntax": "lark"}, "tools[2].custom.format.definition"),
    ],
)
def test_formats_that_are_not_understood_are_refused(format_: Any, param: str) -> None:
    with pytest.raises(RequestError) as error:
        custom_function({"name": "write", "format": format_}, "tools[2].custom")

    assert error.value.param == param
