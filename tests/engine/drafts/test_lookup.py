"""What is looked up: what followed the last time, and what a client expects."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.drafts.base import Draft, Drafter, DraftRequest
from engine.drafts.lookup import LONGEST, LONGEST_MATCH, LookupDrafter, PredictionDrafter


def drafted(drafter: Drafter, text: Sequence[int], most: int = 4) -> Draft:
    (draft,) = drafter.draft([DraftRequest(1, text, most)])
    return draft


def looked_up(text: Sequence[int], most: int = 4) -> Draft:
    drafter = LookupDrafter()
    drafter.open(1, text[:1])
    return drafted(drafter, text, most)


def test_what_followed_the_same_tokens_is_drafted() -> None:
    assert looked_up([5, 6, 7, 8, 9, 5, 6]).token_ids == (7, 8, 9, 5)
    assert looked_up([5, 6, 7, 8, 9, 5, 6], most=1).token_ids == (7,)
    assert looked_up([5, 6, 7, 8, 9]).token_ids == ()
    assert looked_up([5]).token_ids == ()


def test_the_longest_match_counts_then_the_latest() -> None:
    assert looked_up([1, 2, 3, 10, 4, 2, 3, 20, 1, 2, 3]).token_ids[0] == 10
    assert looked_up([1, 2, 10, 3, 1, 2, 20, 4, 1, 2]).token_ids[0] == 20


def test_the_longer_the_match_the_more_telling_the_kind() -> None:
    long = list(range(100, 120))
    assert looked_up([*long, 7, *long]).kind == LONGEST_MATCH
    assert looked_up([1, 2, 3, 9, 1, 2]).kind == 2


def test_a_copy_goes_on_behind_a_word_that_was_replaced() -> None:
    source = list(range(50, 70))
    drafter = LookupDrafter()
    drafter.open(1, source)
    text = [*source, 50, 51, 52]
    assert drafted(drafter, text).token_ids == (53, 54, 55, 56)
    text.append(99)  # instead of 53
    assert drafted(drafter, text) == Draft((54, 55, 56, 57), kind=0)
    text.append(98)  # and it was another word altogether
    assert drafted(drafter, text).token_ids == ()


def test_a_prediction_is_drafted_from_its_beginning_and_found_again() -> None:
    drafter = PredictionDrafter()
    prompt, expected = [1, 2, 3], [10, 11, 12, 13, 14, 15, 16]
    drafter.open(1, prompt, expected)
    assert drafted(drafter, prompt).token_ids == (10, 11, 12, 13)
    assert drafted(drafter, [*prompt, 10, 11]).token_ids == (12, 13, 14, 15)
    assert drafted(drafter, [*prompt, 10, 11, 77]).token_ids == (13, 14, 15, 16)
    assert drafted(drafter, [*prompt, 10, 11, 77, 78, 79, 11, 12]).token_ids == (13, 14, 15, 16)
    assert drafted(drafter, [*prompt, *expected]).token_ids == ()
    drafter.close(1)
    assert drafted(drafter, prompt).token_ids == ()


@given(text=st.lists(st.integers(0, 5), min_size=1, max_size=80), most=st.integers(1, 20))
def test_a_draft_is_a_piece_of_the_text_behind_what_it_ends_in(text: list[int], most: int) -> None:
    draft = looked_up(text, most)
    count = len(draft.token_ids)
    assert count <= min(most, LONGEST)
    if count:
        wanted = text[-draft.kind :] + list(draft.token_ids)
        assert any(text[at : at + len(wanted)] == wanted for at in range(len(text)))


def test_a_text_that_grows_is_held_once() -> None:
    drafter = LookupDrafter()
    text = list(range(100))
    drafter.open(1, text)
    for token in range(3000):
        text.append(token % 7)
        drafted(drafter, text)
    assert drafter.nbytes < 4 * 2 * len(text)
    drafter.close(1)
    assert drafter.nbytes == 0
