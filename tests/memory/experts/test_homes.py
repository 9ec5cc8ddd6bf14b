"""GPUs of different sizes get each layer's experts in proportion to their room, hot and cold ones alike."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from memory.experts.homes import homes_of, shares_of

ROOMS = st.lists(st.integers(0, 40), min_size=1, max_size=4)


@given(ROOMS, st.integers(0, 7), st.integers(0, 60), st.randoms())
def test_as_many_hot_experts_as_there_is_room_for_have_exactly_their_slots(
    room: list[int], first: int, more: int, random: Random
) -> None:
    ranking = list(range(sum(room) + more))
    random.shuffle(ranking)
    homes = homes_of(room, ranking, first)
    held = Counter(homes[expert] for expert in ranking[: sum(room)])
    assert [held[gpu] for gpu in range(len(room))] == room
    assert all(room[gpu] for gpu in homes) or not sum(room)


def test_a_card_of_twice_the_room_gets_every_second_and_third_expert() -> None:
    homes = homes_of([10, 20], list(range(60)))
    for start in range(0, 60, 3):
        assert sorted(homes[start : start + 3]) == [0, 1, 1]


def test_equal_cards_take_turns_and_another_begins_in_the_next_layer() -> None:
    assert homes_of([2, 2], [0, 1, 2, 3, 4, 5]) == [0, 1, 0, 1, 0, 1]
    assert homes_of([2, 2], [0, 1, 2, 3, 4, 5], first=1) == [1, 0, 1, 0, 1, 0]


@given(st.integers(0, 500), st.integers(1, 60))
def test_layers_have_equal_shares_but_for_one(slots: int, layers: int) -> None:
    shares = shares_of(slots, layers)
    assert sum(shares) == slots
    assert max(shares) - min(shares) <= 1
