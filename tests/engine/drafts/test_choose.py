"""How many tokens are drafted: what is measured decides, and little is lost before it is known."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.drafts.acceptance import Acceptance, Kind, Tallies
from engine.drafts.base import Draft
from engine.drafts.choose import (
    FIRST_PROBE,
    LAST_PROBE,
    LATEST_PROBE,
    LOAN,
    LOAN_OF_ALL,
    MOST_CREDIT,
    PER_TOKEN,
    PER_TOKEN_OF_ALL,
    Credit,
    Tries,
    account_of_all,
    best_counts,
)
from engine.drafts.step_times import StepTimes


def counts_of(chances: Sequence[Sequence[float]], each_s: float, *, again: bool = False) -> list[int]:
    """Where a step takes a second, and `each_s` for each further token."""
    tokens = len(chances)
    return best_counts(
        tokens, chances, 16 - tokens, lambda n: 1 + each_s * (n - 1), lambda _: 0.0, computes_again=again
    )


def test_free_tokens_are_all_taken_and_dear_ones_none() -> None:
    assert counts_of([[0.5] * 15], 0.0) == [15]
    assert counts_of([[0.5] * 15], 0.6) == [0]
    assert counts_of([[0.9] * 15], 0.3)[0] > counts_of([[0.7] * 15], 0.3)[0] > 0


def test_rows_go_to_the_sequence_whose_drafts_are_likelier() -> None:
    first, second = counts_of([[0.3] * 8, [0.95] * 8], 0.1)
    assert second > first
    assert counts_of([[], [0.95] * 20], 0.0) == [0, 14]


def test_where_rejected_steps_are_computed_again_fewer_are_taken() -> None:
    assert counts_of([[0.7] * 15], 0.25, again=True) < counts_of([[0.7] * 15], 0.25)


@given(
    chances=st.lists(st.lists(st.floats(0.01, 0.99), max_size=6), min_size=1, max_size=4),
    each_s=st.floats(0, 1),
)
def test_what_is_taken_is_expected_to_be_faster_than_nothing(
    chances: list[list[float]], each_s: float
) -> None:
    counts = counts_of(chances, each_s)
    assert all(count <= len(chain) for count, chain in zip(counts, chances, strict=True))
    expected = float(len(chances))
    for chain, count in zip(chances, counts, strict=True):
        reached = 1.0
        for chance in chain[:count]:
            reached *= chance
            expected += reached
    seconds = 1 + each_s * (len(chances) - 1)
    assert expected / (seconds + each_s * sum(counts)) >= len(chances) / seconds


def test_times_are_learned_from_noisy_steps() -> None:
    rng, times = random.Random(0), StepTimes(16)
    for _ in range(200):
        tokens = rng.choice([1, 1, 2, 4, 8])
        busy = 5.0 if rng.random() < 0.05 else 1.0
        times.observe(tokens, (0.010 + 0.001 * (tokens - 1)) * rng.uniform(0.9, 1.1) * busy)
    for tokens in (1, 2, 4, 8):
        wanted = 0.010 + 0.001 * (tokens - 1)
        assert abs(times.seconds(tokens) - wanted) < 0.35 * wanted
    assert times.seconds(4) < 0.8 * times.seconds(1) * 1.9  # far from the first guess


def test_the_first_steps_which_are_slow_do_not_count() -> None:
    times = StepTimes(16)
    for seconds in (0.5, 0.05, 0.01, 0.011):
        times.observe(1, seconds)
    assert abs(times.seconds(1) - 0.01) < 0.002


def test_a_level_that_rises_is_followed() -> None:
    times = StepTimes(16)
    for _ in range(30):
        times.observe(1, 0.01)
    for _ in range(60):
        times.observe(1, 0.02)
    assert abs(times.seconds(1) - 0.02) < 0.002


def test_what_was_accepted_of_a_kind_is_expected_again() -> None:
    of_all: dict[Kind, Tallies] = {}
    good, bad = Draft((1, 2, 3), kind=8), Draft((1, 2, 3), kind=2)
    first = Acceptance(of_all)
    for _ in range(20):
        first.add("lookup", good, 3, 3)
        first.add("lookup", bad, 0, 3)
    other = Acceptance(of_all)
    assert min(other.chances("lookup", good)) > 0.8
    assert other.chances("lookup", bad)[0] < 0.2
    for _ in range(10):
        other.add("lookup", bad, 3, 3)
    assert other.chances("lookup", bad)[0] > 0.6


def test_a_drafter_that_is_sure_of_itself_is_believed_as_far_as_it_was_right() -> None:
    own = Acceptance({})
    sure, unsure = Draft((1,), (0.95,)), Draft((1,), (0.2,))
    assert own.chances("mtp", sure)[0] > own.chances("mtp", unsure)[0]
    for _ in range(20):
        own.add("mtp", sure, 0, 1)
    assert own.chances("mtp", sure)[0] < 0.8


def test_hopeless_drafts_cost_little_and_are_tried_ever_more_rarely() -> None:
    credit, lost, tries = Credit(), 0.0, 0
    for _ in range(2000):
        credit.generated(1)
        if credit.is_probe_due(is_free=True):
            credit.drafted(-0.5, is_free=True)
            credit.probed(paid=False)
            lost, tries = lost + 0.5, tries + 1
    assert 0 < tries < 12
    assert lost < LOAN + PER_TOKEN * 2000
    assert credit.interval == LAST_PROBE


def test_what_was_gained_may_be_lost_again_up_to_a_limit() -> None:
    credit = Credit()
    credit.drafted(100.0, is_free=True)
    assert credit.own(is_free=True).tokens == MOST_CREDIT
    credit.drafted(-MOST_CREDIT, is_free=True)
    assert not credit.is_left(is_free=True)


def test_what_weights_draft_does_not_use_up_what_look_ups_may_lose() -> None:
    account = account_of_all()
    Credit(account).drafted(-3 * LOAN_OF_ALL, is_free=False)
    assert Credit(account).is_left(is_free=True)
    Credit(account).drafted(-3 * LOAN_OF_ALL, is_free=True)
    assert not Credit(account).is_left(is_free=True)
    assert Credit(account).is_left(is_free=False)


def test_where_trying_paid_for_nobody_the_next_sequences_begin_later() -> None:
    tries = Tries()
    for _ in range(10):
        Credit(None, tries).probed(paid=False)
    assert Credit(None, tries).interval == LATEST_PROBE
    for _ in range(10):
        Credit(None, tries).probed(paid=True)
    assert Credit(None, tries).interval == FIRST_PROBE


def test_many_short_answers_lose_little_together() -> None:
    """Each by itself might lose as much as one long answer."""
    account, lost, tokens = account_of_all(), 0.0, 0
    for _ in range(500):
        credit = Credit(account)
        for _ in range(20):
            tokens += 1
            credit.generated(1)
            if credit.is_left(is_free=True):
                credit.drafted(-0.4, is_free=True)
                lost += 0.4
    assert 0 < lost < LOAN_OF_ALL + PER_TOKEN_OF_ALL * tokens + 0.5


def test_who_gained_pays_for_looking_until_that_is_spent_or_nothing_may_be_lost() -> None:
    of_all = account_of_all()
    credit = Credit(of_all)
    assert not credit.pays_looking
    credit.drafted(3.0, is_free=True)
    assert credit.pays_looking
    for _ in range(6):
        credit.looked(0.5)
    assert not credit.pays_looking
    credit.drafted(5.0, is_free=True)
    of_all.drafted(-20.0)
    assert not credit.pays_looking
    assert Credit(of_all).own(is_free=True).tokens == LOAN
