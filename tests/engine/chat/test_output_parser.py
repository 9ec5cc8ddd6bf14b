"""Reasoning, content and tool calls out of streamed text, without half a tag ever leaking."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chat.call_block import JsonCalls
from engine.chat.output_parser import MessageDelta, OutputParser, PlainParser, TaggedParser, ToolCallDelta

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def parser(*, reasoning: bool = True, in_reasoning: bool = False, tools: bool = True) -> TaggedParser:
    return TaggedParser(reasoning=reasoning, in_reasoning=in_reasoning, calls=JsonCalls() if tools else None)


def run(parser: OutputParser, *pieces: str) -> tuple[str, str, list[ToolCallDelta]]:
    """(reasoning, content, tool calls) of a whole answer."""
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    assert MessageDelta() not in deltas
    return (
        "".join(delta.reasoning for delta in deltas),
        "".join(delta.content for delta in deltas),
        [call for delta in deltas for call in delta.tool_calls],
    )


def test_plain_text_is_content() -> None:
    assert run(PlainParser(), "a<think>", "", "b") == ("", "a<think>b", [])
    assert run(parser(), "Hello ", "world\n") == ("", "Hello world\n", [])


def test_reasoning_stands_between_its_tags() -> None:
    assert run(parser(), "<think>\nHm.\n</think>\n\nYes.") == ("Hm.", "Yes.", [])


def test_reasoning_that_the_prompt_opened_begins_at_once() -> None:
    assert run(parser(in_reasoning=True), "Hm.</think>Yes.") == ("Hm.", "Yes.", [])


def test_reasoning_cut_off_by_a_limit_is_still_reasoning() -> None:
    assert run(parser(), "<think>Hm. So") == ("Hm. So", "", [])


def test_a_think_tag_later_in_the_answer_is_text() -> None:
    assert run(parser(), "The tag <think> opens.") == ("", "The tag <think> opens.", [])


def test_without_reasoning_in_the_dialect_its_tags_are_text() -> None:
    assert run(parser(reasoning=False), "<think>a</think>") == ("", "<think>a</think>", [])


def test_a_tool_call_has_id_name_and_arguments() -> None:
    subject = parser()

    reasoning, content, calls = run(subject, "Let me see.\n\n", CALL)

    assert (reasoning, content) == ("", "Let me see.")
    assert [(call.index, call.name, json.loads(call.arguments)) for call in calls] == [
        (0, "weather", {"city": "Zürich"})
    ]
    assert calls[0].id
    assert calls[0].id.startswith("call_")
    assert subject.has_tool_calls


def test_several_tool_calls_are_counted_and_have_ids_of_their_own() -> None:
    _, content, calls = run(parser(), f"{CALL}\n{CALL}\n")

    assert content == ""
    assert [call.index for call in calls] == [0, 1]
    assert calls[0].id != calls[1].id


def test_arguments_given_as_a_string_are_passed_on_as_they_are() -> None:
    _, _, calls = run(parser(), '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>')

    assert calls[0].arguments == '{"a": 1}'


def test_a_last_tool_call_without_its_end_counts_when_it_is_whole() -> None:
    _, content, calls = run(parser(), CALL.removesuffix("</tool_call>"))

    assert content == ""
    assert calls[0].name == "weather"


@pytest.mark.parametrize(
    "body", ["not json", '{"arguments": {}}', '["name"]', '{"name": 3}', '{"name": "f"', "[" * 100_000]
)
def test_a_broken_tool_call_stays_content(body: str) -> None:
    subject = parser()
    text = f"<tool_call>{body}</tool_call> after"

    assert run(subject, text) == ("", text, [])
    assert not subject.has_tool_calls


def test_without_tools_in_the_request_tool_calls_are_text() -> None:
    assert run(parser(tools=False), CALL) == ("", CALL, [])


def test_content_flows_before_the_answer_ends() -> None:
    subject = parser()

    assert subject.push("Hello") == [MessageDelta(content="Hello")]
    assert subject.push(" <b") == [MessageDelta(content=" <b")]
    assert subject.push(" <tool") == [MessageDelta(content=" ")]
    assert subject.push("ing>") == [MessageDelta(content="<tooling>")]


def test_reasoning_flows_before_it_ends() -> None:
    subject = parser()

    assert subject.push("<thi") == []
    assert subject.push("nk>Hm") == [MessageDelta(reasoning="Hm")]
    assert subject.push("\n</thi") == []
    assert subject.push("s>") == [MessageDelta(reasoning="\n</this>")]


def test_arguments_flow_as_they_are_written() -> None:
    subject = parser()

    assert subject.push('<tool_call>\n{"name": "weather", "argum') == []
    (first,) = subject.push('ents": {"ci')[0].tool_calls
    assert (first.index, first.name, first.arguments) == (0, "weather", '{"ci')
    assert subject.has_tool_calls
    assert subject.push('ty": "}</tool_call>') == [MessageDelta(tool_calls=(ToolCallDelta(0, 'ty": "}'),))]
    assert subject.push('\\"') == []
    assert subject.push('"}}\n</tool_') == [MessageDelta(tool_calls=(ToolCallDelta(0, '</tool_call>\\""}'),))]
    assert subject.push("call>Bye") == [MessageDelta(content="Bye")]
    assert subject.finish() == []


@pytest.mark.parametrize(
    ("end", "arguments"),
    [
        ("", '{"a": "x'),
        ('"', '{"a": "x"'),
        ('"}', '{"a": "x"}'),
        ('"}}', '{"a": "x"}'),
        ('"}}\n</tool', '{"a": "x"}'),
    ],
)
def test_a_call_that_is_cut_off_has_been_sent_as_far_as_it_came(end: str, arguments: str) -> None:
    _, content, calls = run(parser(), BEGUN, "x" + end)

    assert content == ""
    assert added_up(calls) == [("f", arguments)]


@pytest.mark.parametrize("broken", ["\n", '", <', "}", "\\", '", "b": [', "\t{"])
def test_broken_arguments_do_not_swallow_what_follows_their_call(broken: str) -> None:
    _, content, calls = run(parser(), f"{BEGUN}x{broken}}}</tool_call>", f"Then {CALL}")

    assert content == "Then "
    assert [name for name, _ in added_up(calls)] == ["f", "weather"]


ARGUMENTS = '{"code": "def f():\n\tif \\"}\\" in x:\r\n    return {1.0}", "again": {"é": [1e3, null]}}'


@pytest.mark.parametrize(
    "body",
    [
        f'{{"name": "f", "arguments": {ARGUMENTS}}}',
        f'\n{{"arguments": {ARGUMENTS}, "name": "f"}}\n',
        f'{{"name": "f", "parameters": {ARGUMENTS}}}',
        f'{{"parameters":{ARGUMENTS},"name":"f"}}',
        f'{{"name": "f", "arguments": {{}}, "parameters": {ARGUMENTS}}}',
        f'{{"name": "f", "parameters": null, "arguments": {ARGUMENTS}}}',
        f'{{"id": 1, "type": "function", "function": {{"name": "f", "arguments": {ARGUMENTS}}}}}',
        f'{{"function": {{"parameters": {ARGUMENTS}, "name": "f"}}, "type": "function"}}',
        f'{{"type": "function", "name": "f", "arguments": {ARGUMENTS}, "id": "1"}}',
        f'{{"name": "f", "arguments": {json.dumps(ARGUMENTS)}}}',
        f'{{"parameters": {json.dumps(ARGUMENTS)}, "name": "f"}}',
        f'{{"type": "function", "function": {{"name": "f", "arguments": {json.dumps(ARGUMENTS)}}}}}',
        f'[{{"name": "f", "arguments": {ARGUMENTS}}}]',
        f'{{"name": "f", "arguments": {ARGUMENTS}}}}}',
        f'{{"name": "f", "arguments": {ARGUMENTS}',
    ],
)
@pytest.mark.parametrize("closing", ["</tool_call>", "\n</tool_call>\n", "", "\n"])
def test_arguments_are_passed_on_as_the_model_wrote_them(body: str, closing: str) -> None:
    _, content, calls = run(parser(), f"<tool_call>{body}{closing}")

    assert content == ""
    assert added_up(calls) == [("f", ARGUMENTS)]


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('"arguments": {"a": True, \'b\': None}', "{\"a\": True, 'b': None}"),
        ('"arguments": {"a": "x", <}', '{"a": "x", <}'),
        ('"arguments": {"a": "x}', '{"a": "x}}'),
        ('"arguments": {"path": "C:\\dir"}', '{"path": "C:\\dir"}'),
        ('"arguments": "Paris"', "Paris"),
        ('"arguments": [1, 2.0]', "[1, 2.0]"),
        ('"arguments": {}', "{}"),
        ('"arguments": null', "{}"),
        ('"arguments": ""', "{}"),
        ('"type": "function"', "{}"),
    ],
)
def test_arguments_that_are_no_object_are_passed_on_too(body: str, arguments: str) -> None:
    _, content, calls = run(parser(), f'<tool_call>{{"name": "f", {body}}}</tool_call> after')

    assert content == " after"
    assert added_up(calls) == [("f", arguments)]


@pytest.mark.parametrize(
    "body",
    [
        "{'name': 'f', 'arguments': {'a': 1}}",
        '{"name": "f", "city": "Paris"}',
        '{"name": "f", "arguments": {}, "city": "Paris"}',
        '{"function": "f", "arguments": {"a": 1}}',
        '{"name": "", "arguments": {"a": 1}}',
        '{"name": "f", "name": "g", "arguments": {"a": 1}}',
        '{"name": "f", "function": {"arguments": {"a": 1}}}',
        '{"function": {"name": "f", "arguments": "1"}, "arguments": "2"}',
        '{"name": "f", "arguments": "1", "parameters": "2"}',
        'Call this: {"name": "f", "arguments": {"a": 1}}',
        '{"name": "f" "arguments": {"a": 1}}',
        "",
        "\n",
    ],
)
def test_what_cannot_be_made_a_call_is_content_in_full(body: str) -> None:
    text = f"Look:\n\n<tool_call>{body}</tool_call>\nDone."

    assert run(parser(), text) == ("", text, [])


@pytest.mark.parametrize(
    ("rest", "content"),
    [
        (" Then I look.", "Then I look."),
        (', "note": "x"', ', "note": "x"'),
        (', "parameters": {"b": 2}}', '{"parameters": {"b": 2}}'),
        (', "id": 3, "note": "x", "why": [1]}', '{"note": "x", "why": [1]}'),
        ("}\nThat was it.\n", "That was it."),
        ('} {"city": "Paris"}', '{"city": "Paris"}'),
        ("}, ]", ""),
    ],
)
def test_what_a_call_has_no_place_for_is_content(rest: str, content: str) -> None:
    _, told, calls = run(parser(), f'<tool_call>{{"name": "f", "arguments": {{"a": 1}}{rest}</tool_call>')

    assert told == content
    assert added_up(calls) == [("f", '{"a": 1}')]


FIRST, SECOND = '{"name": "f", "arguments": {"a": "{"}}', '{"parameters": {"b": "]"}, "name": "g"}'


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{FIRST}{SECOND}</tool_call>",
        f"<tool_call>\n{FIRST}\n{SECOND}\n</tool_call>",
        f"<tool_call>[{FIRST}, {SECOND}]</tool_call>",
        f"<tool_call>{FIRST}\n<tool_call>{SECOND}</tool_call>",
        f"<tool_call>{FIRST}\n<tool_call>{SECOND}",
        f"<tool_call>{FIRST}</tool_call>\n<tool_call>{SECOND}</tool_call>\n",
    ],
)
def test_several_calls_may_share_their_tags_or_lack_some(text: str) -> None:
    _, content, calls = run(parser(), text)

    assert content == ""
    assert added_up(calls) == [("f", '{"a": "{"}'), ("g", '{"b": "]"}')]


@pytest.mark.parametrize("tag", ["</tool_call>", "<tool_call>", "</tool_call><tool_call>"])
def test_tags_inside_a_string_are_text(tag: str) -> None:
    arguments = f'{{"a": "x{tag}\\"}}y", "{tag}": "{tag}"}}'

    _, content, calls = run(parser(), f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>Bye')

    assert content == "Bye"
    assert added_up(calls) == [("f", arguments)]


@pytest.mark.parametrize("after", ["", " Then.", ' He said: "yes", then', f"\n{CALL}"])
def test_a_string_that_is_never_closed_ends_with_its_call(after: str) -> None:
    _, content, calls = run(parser(), f"{BEGUN}x}}}}</tool_call>{after}")

    assert content == ("" if after == f"\n{CALL}" else after)
    assert added_up(calls)[0] == ("f", '{"a": "x}}')
    assert [name for name, _ in added_up(calls)[1:]] == (["weather"] if after == f"\n{CALL}" else [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(
    arguments=st.dictionaries(st.text(), VALUES, min_size=1, max_size=4),
    key=st.sampled_from(["arguments", "parameters"]),
    name_is_first=st.booleans(),
    indent=st.sampled_from([None, 1]),
    in_ascii=st.booleans(),
    in_function=st.booleans(),
)
def test_any_arguments_arrive_as_they_were_written(
    arguments: dict[str, Any],
    key: str,
    name_is_first: bool,
    indent: int | None,
    in_ascii: bool,
    in_function: bool,
) -> None:
    members = [("name", "f"), (key, arguments)][:: 1 if name_is_first else -1]
    call: dict[str, Any] = dict(members)
    written = json.dumps(arguments, ensure_ascii=in_ascii, indent=indent)
    body = json.dumps(
        {"type": "function", "function": call} if in_function else call, ensure_ascii=in_ascii, indent=indent
    )

    _, content, calls = run(parser(), f"<tool_call>{body}</tool_call>")

    assert content == ""
    ((name, told),) = added_up(calls)
    assert name == "f"
    assert json.loads(told) == arguments
    assert "".join(told.split()) == "".join(written.split())


PIECES = ("\n", "Hi", " ", "<", "</t", "<tool_", "é", '{"name": "f"}', "think>")
BEGUN = '<tool_call>{"name": "f", "arguments": {"a": "'
WITHIN = ('"', "\\", "}", "{", "[", ",", ":", "'", "\t", '{"name": "<', '", "arguments": {', '"parameters": ')
WHOLE = (
    '{"name": "g"}',
    '{"b": 1}',
    '"name": "h"',
    '{"parameters": {"c": "x\ny"}, "name": "i"}',
    '"{\\"d\\": 2}"',
)
PARTS = st.sampled_from([*TAGS, *PIECES, CALL, BEGUN, *WITHIN, *WHOLE])


def added_up(calls: list[ToolCallDelta]) -> list[tuple[str | None, str]]:
    """Name and arguments of each call."""
    names = [call.name for call in calls if call.id is not None]
    return [
        (name, "".join(call.arguments for call in calls if call.index == index))
        for index, name in enumerate(names)
    ]


@given(parts=st.lists(PARTS, max_size=14), data=st.data(), in_reasoning=st.booleans(), tools=st.booleans())
def test_how_the_text_is_cut_into_pieces_changes_nothing(
    parts: list[str], data: st.DataObject, in_reasoning: bool, tools: bool
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    whole = run(parser(in_reasoning=in_reasoning, tools=tools), text)
    cut = run(parser(in_reasoning=in_reasoning, tools=tools), *pieces)

    assert cut[:2] == whole[:2]
    assert added_up(cut[2]) == added_up(whole[2])


@given(cut=st.integers(0, 60))
def test_no_piece_of_a_tag_is_ever_sent(cut: int) -> None:
    text = f"<think>\nHm\n</think>\n\nA{CALL}"
    subject = parser()

    sent = [*subject.push(text[:cut]), *subject.push(text[cut:]), *subject.finish()]

    assert all("<" not in delta.content + delta.reasoning for delta in sent)
