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
    return ReplicaState(b"".join(block for prompt in held for block in prompt), SLOTS, stats(**figures))


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
    affinity.give("first", "b", blocks(1, 2, 3))
    assert affinity.order(blocks(1, 2, 3, 4), ["a", "b"])[0] == "b"
    affinity.end("first", "b")
    clock.now += TOLD_S / 2
    assert affinity.order(blocks(1, 2, 3, 4), ["a", "b"])[0] == "b"
    clock.now += TOLD_S  # by now it would have told, if it had kept it
    assert affinity.order(blocks(1, 2, 3, 4), ["a", "b"]) == ["a", "b"]


def test_a_replica_that_is_much_busier_is_passed_over(affinity: Affinity) -> None:
    affinity.tell("a", state(blocks(1, 2)))
    for number in range(SLOTS // 2):
        assert affinity.order(blocks(1, 2), ["a", "b"])[0] == "a"
        affinity.give(f"s{number}", "a", blocks(1, 2))
    affinity.give("one more", "a", blocks(1, 2))
    assert affinity.order(blocks(1, 2), ["a", "b"]) == ["b", "a"]
    affinity.end("s0", "a")
    assert affinity.order(blocks(1, 2), ["a", "b"])[0] == "a"


def test_without_a_prefix_the_least_busy_one_is_chosen(affinity: Affinity) -> None:
    affinity.give("x", "a", blocks(5))
    assert affinity.order(blocks(6), ["a", "b"])[0] == "b"


def test_what_was_withdrawn_on_its_way_burdens_nobody(affinity: Affinity) -> None:
    affinity.give("x", "a", blocks(5), is_withdrawn=lambda: True)
    assert affinity.order(blocks(5), ["a", "b"]) == ["a", "b"]
    affinity.give("y", "b", blocks(5))
    assert affinity.order(blocks(5), ["a", "b"])[0] == "b"


def test_a_sequence_that_is_given_to_another_replica_has_left_the_first(affinity: Affinity) -> None:
    affinity.give("x", "a", blocks(5))
    affinity.give("x", "b", blocks(5))
    affinity.end("x", "a")  # what is told late of the first changes nothing
    assert affinity.order(blocks(6), ["a", "b"])[0] == "a"
    assert affinity.order(blocks(5), ["a", "b"])[0] == "b"


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
    for name, asked in (("x", blocks(1, 2, 3)), ("y", blocks(9))):
        affinity.give(name, "a", asked)
        affinity.arrived(name)
    routed = affinity.routed
    assert routed.sequences == {("a", "prefix"): 1, ("a", "load"): 1}
    assert routed.tokens == {"a": 2 * BLOCK}
