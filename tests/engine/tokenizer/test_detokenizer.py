"""Streaming text: characters and stop strings that straddle tokens never leak."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.tokenizer import Tokenizer
from tests.conftest import golden_path


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(golden_path("v41-c"))


def ids_of_bytes(data: bytes) -> list[int]:
    """One token per byte, whatever the bytes are."""
    by_bytes = {tokenizer().token_bytes(i): i for i in range(tokenizer().size - 1, -1, -1)}
    return [by_bytes[bytes([b])] for b in data]


def stream(ids: list[int], *stop: str, include_stop: bool = False) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer(), stop, include_stop=include_stop)
    pieces = []
    for token_id in ids:
        piece = detokenizer.push(token_id)
        pieces.append(piece.text)
        if piece.stop is not None:
            return pieces, piece.stop
    last = detokenizer.finish()
    return [*pieces, last.text], last.stop


def test_a_character_of_four_bytes_comes_with_its_last_byte() -> None:
    assert stream(ids_of_bytes("a🐟b".encode()))[0] == ["a", "", "", "", "🐟", "b", ""]


def test_a_character_that_never_completes_is_replaced_at_the_end() -> None:
    assert stream(ids_of_bytes("é".encode()[:1])) == (["", "\ufffd"], None)


def test_bytes_that_are_no_text_do_not_hold_up_what_follows() -> None:
    assert "".join(stream(ids_of_bytes(b"\xff\xfe\xe4\xb8\xadx"))[0]) == "\ufffd\ufffd中x"


def test_text_that_may_not_stop_is_no_part_of_a_stop_string() -> None:
    detokenizer = Detokenizer(tokenizer(), ("ab",))
    first, *others = ids_of_bytes(b"aabb")
    pieces = [detokenizer.push(first, may_stop=False), *map(detokenizer.push, others)]
    assert [(piece.text, piece.stop) for piece in pieces[:3]] == [("a", None), ("", None), ("", "ab")]


def test_special_tokens_make_text_unless_they_are_skipped() -> None:
    special = tokenizer().added_tokens
    ids = [*ids_of_bytes(b"a"), *special.values(), *ids_of_bytes(b"b")]
    skipping = Detokenizer(tokenizer(), skip_special=True)

    assert "".join(skipping.push(i).text for i in ids) == "ab"
    assert "".join(stream(ids)[0]) == f"a{''.join(special)}b"


@given(st.binary(max_size=40))
def test_streamed_text_is_the_text_of_all_bytes(data: bytes) -> None:
    assert "".join(stream(ids_of_bytes(data))[0]) == data.decode(errors="replace")


@given(st.lists(st.integers(0, 1023), max_size=40))
def test_streamed_text_is_the_text_of_all_tokens(ids: list[int]) -> None:
    assert "".join(stream(ids)[0]) == tokenizer().decode(ids)


def test_a_stop_string_over_several_tokens_is_not_seen_in_part() -> None:
    pieces, stop = stream(ids_of_bytes(b"one STOP two"), "STOP")
    assert "".join(pieces) == "one "
    assert stop == "STOP"


def test_the_beginning_of_a_stop_string_that_goes_on_otherwise_is_released() -> None:
    pieces, stop = stream(ids_of_bytes(b"a STONE"), "STOP")
    assert pieces[:6] == ["a", " ", "", "", "", "STON"]
    assert stop is None


def test_text_held_back_at_the_end_is_released() -> None:
    assert "".join(stream(ids_of_bytes(b"a STO"), "STOP")[0]) == "a STO"


def test_the_earliest_of_several_stop_strings_wins_and_the_longest_of_those() -> None:
    assert stream(ids_of_bytes(b"xaby"), "b", "ab")[1] == "ab"
    assert "".join(stream(ids_of_bytes(b"xaby"), "b", "ab")[0]) == "x"


def test_a_stop_string_can_be_part_of_the_text() -> None:
    pieces, stop = stream(ids_of_bytes(b"one. two"), ".", include_stop=True)
    assert ("".join(pieces), stop) == ("one.", ".")


@pytest.mark.parametrize("stop", ["é", "中文"])
def test_a_stop_string_of_several_bytes_is_found(stop: str) -> None:
    pieces, found = stream(ids_of_bytes(f"ab{stop}cd".encode()), stop)
    assert ("".join(pieces), found) == ("ab", stop)


@given(text=st.text("abST", max_size=30), stops=st.lists(st.text("abST", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, found = stream(ids_of_bytes(text.encode()), *stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        assert found is not None
        assert text.startswith("".join(pieces) + found)
        assert not any(stop in "".join(pieces) for stop in stops)
    else:
        assert ("".join(pieces), found) == (text, None)
