"""What the supported families write: reasoning, text and calls are told apart, however the text arrives."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chat.dialects import calls_of, think_tags_of, writes_messages
from engine.chat.harmony import TAGS, HarmonyParser
from engine.chat.output_parser import OutputParser, TaggedParser
from tests.engine.chat.transcripts import BROKEN, CUT_OFF, SCHEMAS, TEMPLATES, TRANSCRIPTS, Transcript


def parser(family: str, *, thinks: bool = False, tokens: Collection[str] = ()) -> OutputParser:
    template = TEMPLATES[family]
    if writes_messages(template):
        return HarmonyParser(tools=True, tokens=tokens)
    calls = calls_of(template)
    assert calls is not None
    think = think_tags_of(template)
    return TaggedParser(
        reasoning=think is not None,
        in_reasoning=thinks,
        calls=calls.form,
        schemas=SCHEMAS,
        tokens=tokens,
        think=think or ("", ""),
    )


Told = tuple[str, str, list[tuple[str, str]], list[str]]


def told(transcript: Transcript, pieces: list[str]) -> Told:
    """(reasoning, content, calls as name and text of arguments, the model's own ids)."""
    subject = parser(transcript.family, thinks=transcript.thinks)
    deltas = [delta for piece in pieces for delta in subject.push(piece)] + subject.finish()
    calls: list[tuple[str, str]] = []
    ids = []
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        if piece.index == len(calls):
            calls.append((piece.name or "", ""))
            ids += [piece.id] if piece.id and not piece.id.startswith("call_") else []
        name, arguments = calls[piece.index]
        calls[piece.index] = (name, arguments + piece.arguments)
    assert subject.has_tool_calls == bool(calls)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return reasoning, "".join(delta.content for delta in deltas), calls, ids


def names(transcript: Transcript) -> str:
    return f"{transcript.family}: {transcript.text[:20]}"


@pytest.mark.parametrize("transcript", TRANSCRIPTS + BROKEN, ids=names)
def test_an_answer_is_told_apart(transcript: Transcript) -> None:
    reasoning, content, calls, ids = told(transcript, [transcript.text])

    assert (reasoning, content) == (transcript.reasoning, transcript.content)
    assert [(name, json.loads(arguments)) for name, arguments in calls] == transcript.calls
    assert not transcript.ids or ids == transcript.ids


@pytest.mark.parametrize("transcript", TRANSCRIPTS + BROKEN, ids=names)
def test_an_answer_that_is_cut_in_two_is_told_as_the_whole(transcript: Transcript) -> None:
    text = transcript.text
    whole = told(transcript, [text])

    for at in range(1, len(text)):
        assert told(transcript, [text[:at], text[at:]]) == whole, text[:at]
    assert told(transcript, list(text)) == whole


@pytest.mark.slow
@given(data=st.data())
def test_whatever_an_answer_is_cut_into_it_is_told_as_the_whole(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS + BROKEN))
    # Pieces of answers in any order are answers, too.
    parts = data.draw(
        st.lists(st.sampled_from([transcript.text, "x", "\n", "{", "<", "</tool_call>"]), min_size=1)
    )
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    subject = Transcript(transcript.family, text, thinks=transcript.thinks)

    assert told(subject, pieces)[:3] == told(subject, [text])[:3]


@pytest.mark.parametrize("family", ["Kimi-K2", "DeepSeek-V3.1", "Mistral, newer", "GLM-4.5", "gpt-oss"])
def test_tags_that_are_tokens_count_only_as_tokens(family: str) -> None:
    transcript = next(t for t in TRANSCRIPTS if t.family == family and t.calls)
    calls = calls_of(TEMPLATES[family])
    tags = TAGS if calls is None else calls.form.tags
    ranges = tuple(match.span() for match in re.finditer("|".join(map(re.escape, tags)), transcript.text))

    written = parser(family, tokens=tags)
    deltas = written.push(transcript.text, ranges) + written.finish()
    assert "".join(delta.content for delta in deltas) == transcript.content
    assert [c.name for delta in deltas for c in delta.tool_calls if c.name] == [
        n for n, _ in transcript.calls
    ]

    spelled = parser(family, tokens=tags)
    deltas = spelled.push(transcript.text, ()) + spelled.finish()
    assert "".join(delta.content for delta in deltas).endswith(transcript.text[-20:])
    assert not spelled.has_tool_calls


@pytest.mark.parametrize(("family", "text", "arguments"), CUT_OFF)
def test_a_call_that_is_cut_off_has_been_sent_as_far_as_it_came(
    family: str, text: str, arguments: str
) -> None:
    reasoning, content, calls, _ = told(Transcript(family, text), list(text))

    assert (reasoning, content, calls) == ("", "", [("weather", arguments)])


@pytest.mark.parametrize(
    "transcript", [t for t in TRANSCRIPTS if t.calls and len(t.calls[0][1]) > 1], ids=names
)
def test_arguments_arrive_in_pieces(transcript: Transcript) -> None:
    subject = parser(transcript.family, thinks=transcript.thinks)

    pieces = [c for letter in transcript.text for delta in subject.push(letter) for c in delta.tool_calls]

    assert sum(piece.index == 0 for piece in pieces) > 3
    assert pieces[0].name == transcript.calls[0][0]
    assert all(piece.name is None and piece.id is None for piece in pieces[1:] if piece.index == 0)
