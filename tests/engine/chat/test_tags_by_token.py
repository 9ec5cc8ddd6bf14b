"""A tag that the vocabulary has as a token is that token; text that spells it stays text."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.chat.deepseek import DeepseekChat
from engine.chat.format import ChatFormat
from engine.chat.output_parser import MessageDelta, OutputParser
from engine.chat.template import TemplateChat
from engine.output import FinishReason, Output, joined
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence
from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.tokenizer import Tokenizer

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "｜DSML｜")
TEMPLATE = "{{ tools }}{{ messages[0].content }}{# <think> </think> <tool_call> #}"
UNUSED: Any = None
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = '{"name": "f", "arguments": {"a": "1"}}'
DSML_CALL = (
    '\n\n<{0} calls>\n<{0} invoke name="f">\n<{0} parameter name="a" string="true">1</{0} parameter>\n'
    "</{0} invoke>\n</{0} calls>"
)


@cache
def tokenizer(*added: str) -> Tokenizer:
    """One token a byte, and the tags that are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return Tokenizer(backend, bos_token_id=None, add_bos=False)


def parser(kind: str, *added: str) -> OutputParser:
    known = tokenizer(*added)
    chat: ChatFormat = (
        TemplateChat(known, TEMPLATE) if kind == "tagged" else DeepseekChat(known, "deepseek_v41")
    )
    return chat.render({"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}).new_parser()


def ids_of(pieces: list[str], *added: str) -> list[int]:
    """Tokens that write `pieces`: a tag is a token where the vocabulary has it, all else is bytes."""
    known = tokenizer(*added)
    return [
        i
        for piece in pieces
        for i in ([known.added_tokens[piece]] if piece in added else known.encode(piece, parse_special=False))
    ]


def outputs(ids: list[int], added: tuple[str, ...], stop: tuple[str, ...] = ()) -> list[Output]:
    """What a sequence reports while it writes `ids`."""
    reported: list[Output] = []
    sequence = Sequence(
        sequence_id=1,
        token_ids=[0],
        params=SamplingParams(stop=stop),
        max_tokens=len(ids),
        stop_token_ids=frozenset(),
        sampler=UNUSED,
        detokenizer=Detokenizer(tokenizer(*added), stop),
        on_output=reported.append,
    )
    for i in ids:
        if sequence.finish_reason is None:
            sequence.append(i, ())
    return reported


def answer(parser: OutputParser, told: list[Output]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """(reasoning, content, calls) of a whole answer."""
    deltas = [delta for output in told for delta in parser.push(output.text, output.special_ranges)]
    return added_up([*deltas, *parser.finish()])


def added_up(deltas: list[MessageDelta]) -> tuple[str, str, list[tuple[str | None, str]]]:
    pieces = [call for delta in deltas for call in delta.tool_calls]
    calls = [
        (first.name, "".join(piece.arguments for piece in pieces if piece.index == first.index))
        for first in pieces
        if first.id is not None
    ]
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas), calls


def said(kind: str, pieces: list[str], added: tuple[str, ...] = TAGS, stop: tuple[str, ...] = ()) -> Any:
    return answer(parser(kind, *added), outputs(ids_of(pieces, *added), added, stop))


@pytest.mark.parametrize(("kind", "opening"), [("tagged", ["<think>"]), ("deepseek", [])])
def test_reasoning_that_quotes_its_end_goes_on(kind: str, opening: list[str]) -> None:
    pieces = [*opening, "hmm </th", "ink> no ", "</think>", "\n\nanswer </th", "ink>"]

    assert said(kind, pieces) == ("hmm </think> no ", "answer </think>", [])


@pytest.mark.parametrize(("kind", "opening"), [("tagged", ["<think>"]), ("deepseek", [])])
def test_a_tag_that_is_no_token_is_told_by_its_spelling(kind: str, opening: list[str]) -> None:
    assert said(kind, [*opening, "hmm </th", "ink>answer"], ("｜DSML｜",)) == ("hmm ", "answer", [])


def test_an_answer_that_quotes_the_beginning_of_reasoning_is_content() -> None:
    assert said("tagged", ["<th", "ink>hmm", "</think>", "x"]) == ("", "<think>hmm</think>x", [])


def test_a_call_that_is_quoted_is_content() -> None:
    quoted = f"<tool_call>{CALL}</tool_call> "

    assert said("tagged", [quoted, "<tool_call>", CALL, "</tool_call>"]) == (
        "",
        quoted,
        [("f", '{"a": "1"}')],
    )


def test_arguments_may_quote_the_end_of_a_call() -> None:
    arguments = '{"a": "</tool_call>", "b": 1}'
    call = f'{{"name": "f", "arguments": {arguments}}}'

    assert said("tagged", ["<tool_call>", call, "</tool_call>", "x"]) == ("", "x", [("f", arguments)])


def test_a_quoted_call_in_deepseeks_dialect_is_content() -> None:
    quoted = DSML_CALL.format("｜DSML｜")

    assert said("deepseek", ["</think>", "See" + quoted]) == ("", "See" + quoted, [])
    called = ["</think>", "See", *re_cut(quoted)]
    assert said("deepseek", called) == ("", "See", [("f", '{"a": "1"}')])


def re_cut(text: str) -> list[str]:
    """The text with its tags as pieces of their own."""
    first, *others = text.split("｜DSML｜")
    return [first, *itertools.chain.from_iterable(("｜DSML｜", other) for other in others)]


def test_arguments_may_quote_deepseeks_tags() -> None:
    first, last = DSML_CALL.split("1")
    pieces = [
        "</think>",
        *re_cut(first.format("｜DSML｜")),
        "</｜DSML｜ parameter>",
        *re_cut(last.format("｜DSML｜")),
    ]

    assert said("deepseek", pieces) == ("", "", [("f", '{"a": "</｜DSML｜ parameter>"}')])


def test_characters_that_stand_for_tags_are_no_way_to_write_them() -> None:
    assert said("deepseek", ["hmm \ufdd1 no ", "</think>", "x"]) == ("hmm \ufffd no ", "x", [])


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("nk>x", ("hmm", "answer")), ("</think>", ("hmm", "")), ("m</th", ("hm", "")), ("think", ("", "<"))],
)
def test_a_stop_string_may_touch_a_tag(stop: str, expected: tuple[str, str]) -> None:
    pieces = ["<think>", "hmm", "</think>", "answer"]

    assert said("tagged", pieces, stop=(stop,)) == (*expected, [])


PIECES = st.lists(
    st.sampled_from([*TAGS, "</th", "ink>", "<", "é", "\n", CALL, "<tool_", "call>", "a"]), max_size=12
)


@given(pieces=PIECES, cuts=st.lists(st.booleans(), min_size=300, max_size=300))
def test_outputs_that_are_read_together_say_the_same(pieces: list[str], cuts: list[bool]) -> None:
    told = outputs(ids_of(pieces, *TAGS), TAGS)
    groups: list[list[Output]] = [[]]
    for output, is_cut in zip(told, cuts, strict=False):
        if is_cut and groups[-1]:
            groups.append([])
        groups[-1].append(output)
    together = [joined(group) for group in groups if group]

    assert answer(parser("tagged", *TAGS), together) == answer(parser("tagged", *TAGS), told)


@given(pieces=PIECES, stop=st.sampled_from([(), ("a<",), ("k>",), ("</think>a",), ("ll>é",)]))
def test_special_ranges_are_where_tags_were_written_as_tokens(
    pieces: list[str], stop: tuple[str, ...]
) -> None:
    told = outputs(ids_of(pieces, *TAGS), TAGS, stop)

    found = [output.text[a:b] for output in told for a, b in output.special_ranges or ()]
    written = [piece for piece in pieces if piece in TAGS]
    assert found == written[: len(found)]
    if told and told[-1].finish_reason is FinishReason.LENGTH:
        assert found == written
