"""A sequence goes to the replica that knows most of its prompt, unless that one is much busier."""

from __future__ import annotations

import numpy as np
import pytest

from engine.cache.digest import BLOCK, block_hashes
from engine.cache.prefixes import PrefixStats
from engine.engine import EngineStats
from server.cluster.affinity import TOLD_S, Affinity
from server.cluster.asked import ReplicaState

SLOTS = 8
CONTEXT = 1000


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def blocks(*numbers: int) -> tuple[bytes, ...]:
    """Of a prompt that has a block of tokens for each number."""
    return block_hashes(np.repeat(np.asarray(numbers, np.int32), BLOCK), "")


def stats(prompt_tokens: int = 0, running: int = 0) -> EngineStats:
    prefixes = PrefixStats(3, 2, 100, 0, 5000, 9000)
    return EngineStats(running, 0, prompt_tokens, 7, 2, 0, 0, 0, 0.5, 0.25, prefixes=prefixes)


def state(*held: tuple[bytes, ...], **figures: int) -> ReplicaState:
    hashes = b"".join(block for prompt in held for block in prompt)
    return ReplicaState(hashes, CONTEXT, SLOTS, stats(**figures))


def begun(affinity: Affinity, replica: str, asked: tuple[bytes, ...]) -> int:
    """The number of an attempt that a replica has accepted."""
    attempt = affinity.begin()
    affinity.give(attempt, replica, asked)
    affinity.arrived(attempt, replica, asked)
    return attempt


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def affinity(clock: Clock) -> Affinity:
    found = Affinity(clock)
    for name in "ab":
        found.tell(name, state())
    return found


def test_the_longest_prefix_wins(affinity: Affinity) -> None:
    affinity.tell("a", state(blocks(1, 2)))
    affinity.tell("b", state(blocks(1, 2, 3, 4)))
    assert affinity.order(blocks(1, 2, 3, 9), ["a", "b"]) == ["b", "a"]
    assert affinity.order(blocks(1, 2, 9), ["a", "b"]) == ["a", "b"]  # both know as much; b holds more
    assert affinity.order(blocks(9), ["b", "a"])[0] == "a"


def test_a_second_request_follows_the_first_before_anything_was_told(
    affinity: Affinity, clock: Clock
) -> None:
    attempt = affinity.begin()
    affinity.give(attempt, "b", blocks(1, 2, 3))
    assert affinity.order(blocks(1, 2, 3, 4), ["a", "b"])[0] == "b"
    affinity.arrived(attempt, "b", blocks(1, 2, 3))
    affinity.end(attempt)
    clock.now += TOLD_S / 2
    assert affinity.order(blocks(1, 2, 3, 4), ["a", "b"])[0] == "b"
    clock.now += TOLD_S  # by now it would have told, if it had kept it
    assert affinity.order(blocks(1, 2, 3, 4), ["a", "b"]) == ["a", "b"]


def test_a_replica_that_is_much_busier_is_passed_over(affinity: Affinity) -> None:
    affinity.tell("a", state(blocks(1, 2)))
    for _ in range(SLOTS // 2):
        assert affinity.order(blocks(1, 2), ["a", "b"])[0] == "a"
        begun(affinity, "a", blocks(1, 2))
    one_more = begun(affinity, "a", blocks(1, 2))
    assert affinity.order(blocks(1, 2), ["a", "b"]) == ["b", "a"]
    affinity.end(one_more)
    assert affinity.order(blocks(1, 2), ["a", "b"])[0] == "a"


def test_without_a_prefix_the_least_busy_one_is_chosen(affinity: Affinity) -> None:
    begun(affinity, "a", blocks(5))
    assert affinity.order(blocks(6), ["a", "b"])[0] == "b"


def test_what_was_withdrawn_on_its_way_burdens_nobody(affinity: Affinity) -> None:
    attempt = affinity.begin()
    affinity.give(attempt, "a", blocks(5))
    affinity.end(attempt)
    affinity.give(attempt, "a", blocks(5))  # a router that had not heard of it yet
    affinity.arrived(attempt, "a", blocks(5))
    assert affinity.order(blocks(5), ["a", "b"]) == ["a", "b"]
    begun(affinity, "b", blocks(5))
    assert affinity.order(blocks(5), ["a", "b"])[0] == "b"


def test_a_sequence_that_another_replica_has_accepted_is_there(affinity: Affinity) -> None:
    attempt = affinity.begin()
    affinity.give(attempt, "a", blocks(5))
    affinity.arrived(attempt, "b", blocks(5))
    assert affinity.order(blocks(6), ["a", "b"])[0] == "a"
    assert affinity.order(blocks(5), ["a", "b"])[0] == "b"
    assert affinity.routed.sequences == {("b", "load"): 1}
    affinity.end(attempt)
    begun(affinity, "b", blocks(7))  # what it had is no load of either any more
    assert affinity.order(blocks(6), ["b", "a"])[0] == "a"


def test_a_replica_that_was_given_up_and_is_there_after_all_has_no_load(affinity: Affinity) -> None:
    attempt = begun(affinity, "a", blocks(1))
    affinity.lose("a")
    affinity.keep_only("ab")
    affinity.end(attempt)
    other = begun(affinity, "b", blocks(2))
    assert affinity.order(blocks(3), ["b", "a"])[0] == "a"
    affinity.end(other)
    begun(affinity, "a", blocks(4))
    assert affinity.order(blocks(3), ["a", "b"])[0] == "b"


def test_a_sequence_may_be_as_long_as_the_smallest_replica_allows(affinity: Affinity) -> None:
    assert affinity.context == CONTEXT
    affinity.tell("b", ReplicaState(b"", CONTEXT // 2, SLOTS, stats()))
    assert affinity.context == CONTEXT // 2
    affinity.lose("b")
    assert affinity.context == CONTEXT


def test_a_replica_that_is_gone_leaves_its_counts_behind(affinity: Affinity) -> None:
    affinity.tell("a", state(blocks(1), prompt_tokens=40, running=2))
    affinity.tell("b", state(blocks(2), prompt_tokens=2))
    affinity.lose("a")
    affinity.keep_only(["b", "c"])
    found = affinity.stats()
    assert (found.prompt_tokens, found.running, affinity.up, affinity.gone) == (42, 0, 2, 1)
    assert found.prefixes == PrefixStats(6, 4, 200, 0, 5000, 9000)
    assert affinity.order(blocks(1), ["b", "c"])[0] == "c"  # which is empty


def test_why_a_replica_was_chosen_is_counted(affinity: Affinity) -> None:
    affinity.tell("a", state(blocks(1, 2)))
    for asked in (blocks(1, 2, 3), blocks(9)):
        begun(affinity, "a", asked)
    routed = affinity.routed
    assert routed.sequences == {("a", "prefix"): 1, ("a", "load"): 1}
    assert routed.tokens == {"a": 2 * BLOCK}
