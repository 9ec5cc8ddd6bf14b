"""Policies: what they keep, and Belady's bound that none exceeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.experts.policy import (
    EXCHANGE_MARGIN,
    NO_NEIGHBOURS,
    POLICIES,
    AgedLfu,
    Lru,
    Neighbours,
    Predictive,
    belady_hits,
    replay,
)

EXPERTS = 12
TRACES = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), min_size=1, max_size=60)


def test_lru_lets_go_of_what_was_used_longest_ago() -> None:
    policy = Lru(4)
    for step in ([0], [1], [2], [0]):
        policy.used(step)
    assert policy.victim([0, 1, 2]) == 1


def test_lfu_lets_go_of_what_was_used_least() -> None:
    policy = AgedLfu(4)
    for step in ([0], [0], [1], [0, 2], [2]):
        policy.used(step)
    assert policy.victim([0, 1, 2]) == 1


def test_old_uses_count_for_less() -> None:
    policy = AgedLfu(2, half_life=2)
    for step in ([0], [0], [0], [1], [1], [1]):
        policy.used(step)
    assert policy.victim([0, 1]) == 0


def test_an_expert_that_is_expected_stays() -> None:
    policy = Predictive(4)
    for _ in range(5):
        policy.used([0, 1])
    policy.expected([3])
    assert policy.victim([0, 1, 3]) != 3
    policy.used([0])
    assert policy.victim([0, 1, 3]) == 3


def test_what_usually_follows_is_kept() -> None:
    policy = Predictive(3)
    for _ in range(20):
        policy.used([0])
        policy.used([1])
        policy.used([2])
    policy.used([0])
    assert policy.victim([1, 2]) == 2


@pytest.mark.parametrize("neighbour", [0, 1])
def test_what_usually_follows_an_expert_of_a_neighbouring_layer_is_kept(neighbour: int) -> None:
    policy = Predictive(6)

    def neighbours(expert: int) -> Neighbours:
        return ((), (expert,)) if neighbour else ((expert,), ())

    for _ in range(20):
        for announced in (1, 2):
            policy.used([0], neighbours(announced))
            policy.used([announced], NO_NEIGHBOURS)
            for _ in range(4):
                policy.used([3], NO_NEIGHBOURS)
    policy.used([0], neighbours(1))
    assert policy.victim([1, 2]) == 2


@pytest.mark.parametrize(("first", "is_learned"), [([0, 1, 2, 3], False), ([0], True)])
def test_a_prompt_that_used_nearly_all_experts_does_not_say_what_follows(
    first: list[int], is_learned: bool
) -> None:
    policy = Predictive(6)
    pause: list[list[int]] = [[]] * 5
    for _ in range(20):
        for step in (first, [5], *pause, [4], *pause):
            policy.used(step)
    policy.used([0])
    assert (policy.victim([4, 5]) == 4) == is_learned


def test_hot_experts_of_a_profile_rank_first() -> None:
    prior = np.array([0.1, 0.0, 0.6, 0.3])
    assert Predictive(4, prior=prior).ranking() == [2, 3, 0, 1]


@pytest.mark.parametrize("name", POLICIES)
@given(trace=TRACES, slots=st.integers(1, EXPERTS))
def test_no_policy_hits_more_than_belady(name: str, trace: list[set[int]], slots: int) -> None:
    assert replay(trace, slots, POLICIES[name](EXPERTS)).hits <= belady_hits(trace, slots, EXPERTS)


@given(trace=TRACES)
def test_with_room_for_all_only_first_uses_miss(trace: list[set[int]]) -> None:
    first_uses = len(set().union(*trace))
    expected = sum(len(step) for step in trace) - first_uses
    assert belady_hits(trace, EXPERTS, EXPERTS) == expected
    assert replay(trace, EXPERTS, Lru(EXPERTS)).hits == expected


def test_belady_on_a_loop_keeps_what_comes_back_soonest() -> None:
    loop = [{0}, {1}, {2}] * 10
    assert belady_hits(loop, 2, 3) > replay(loop, 2, Lru(3)).hits == 0


def test_with_a_margin_experts_that_are_used_alike_do_not_change_places() -> None:
    random = np.random.default_rng(0)
    alike = [set(random.choice(24, 2, replace=False).tolist()) for _ in range(1000)]
    plain, held = (replay(alike, 6, Predictive(24), margin) for margin in (1.0, EXCHANGE_MARGIN))
    assert held.exchanges < plain.exchanges / 2
    assert abs(held.hits - plain.hits) < plain.hits / 10


def test_with_a_margin_the_hot_experts_still_come_in() -> None:
    trace = [{0, 1}] * 50 + [{8, 9}] * 50
    assert replay(trace, 2, Predictive(24), EXCHANGE_MARGIN).hits >= 180
