"""Memory that follows use: what slots take, what they give back, and that it is counted as it is."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
import torch

from engine.cache import pages as pages_module
from engine.cache.pages import KEPT_TOKENS, Pages, PoolShortError
from memory.pages.space import HostSpace
from quant.errors import BudgetError

HOST = torch.device("cpu")
CAPACITY = 1 << 20
DIM = 128


def pages_of(slots: int, tokens: int | None = None) -> tuple[Pages, torch.Tensor, torch.Tensor]:
    """Keys of every token and an entry of every four, in a pool that holds a sequence of so many tokens."""
    pages = Pages(slots)
    keys = pages.reserve((3, slots, CAPACITY, DIM), slot_axis=1, ratio=1, device=HOST)
    entries = pages.reserve((slots, CAPACITY // 4, DIM), slot_axis=0, ratio=4, device=HOST)
    if tokens is not None:
        assert pages.fit(CAPACITY, {}, pages.nbytes(tokens)) >= tokens
    return pages, keys, entries


def fill(tensors: tuple[torch.Tensor, torch.Tensor], slot: int, tokens: int) -> None:
    keys, entries = tensors
    keys[:, slot, :tokens] = 1.0
    entries[slot, : tokens // 4] = 1.0


def test_a_sequence_takes_what_its_tokens_need_and_no_more() -> None:
    pages, *_ = pages_of(4)
    pages.hold(1, 8000)
    row = DIM * 4
    assert pages.held_bytes(1) == pages.taken_bytes == (3 * 8000 + 2000) * row
    pages.hold(1, 8001)
    assert pages.held_bytes(1) == (3 * 8008 + 2000) * row, "a page has eight rows, of each layer's run"
    pages.hold(1, 5)
    assert pages.held_bytes(1) == (3 * 8008 + 2000) * row, "a sequence that is shorter keeps its pages"


def test_what_is_counted_is_what_the_process_takes() -> None:
    pages, *tensors = pages_of(4, 60_000)
    process = psutil.Process()
    fill((tensors[0], tensors[1]), 3, 8)  # what torch itself takes when it first writes
    before, largest = process.memory_info().rss, 0
    for slot, tokens in ((0, 30_000), (1, 20_000), (2, 9_000)):
        pages.hold(slot, tokens)
        fill((tensors[0], tensors[1]), slot, tokens)
        taken = process.memory_info().rss - before
        assert taken == pytest.approx(pages.taken_bytes, rel=0.02)
        largest = max(largest, taken)
    assert pages.budget_bytes is not None
    assert largest <= 1.02 * pages.budget_bytes
    for slot in range(3):
        pages.release(slot)
    assert pages.taken_bytes == 3 * pages.nbytes(KEPT_TOKENS)
    taken = process.memory_info().rss - before
    assert taken == pytest.approx(pages.taken_bytes, abs=0.02 * pages.budget_bytes)


def test_a_pool_is_never_above_its_budget() -> None:
    pages, *_ = pages_of(4, 10_000)
    pages.hold(0, 6_000)
    with pytest.raises(PoolShortError, match="no room for 5000 tokens"):
        pages.hold(1, 5_000)
    assert pages.held_bytes(1) == 0
    pages.hold(1, 4_000)
    assert pages.budget_bytes is not None
    assert pages.peak_bytes == pages.taken_bytes <= pages.budget_bytes


def test_pages_of_an_ended_sequence_stay_until_another_needs_them() -> None:
    pages, *_ = pages_of(4, 10_000)
    pages.hold(0, 9_000)
    with pytest.raises(PoolShortError):
        pages.hold(1, 2_000)
    pages.release(0)
    assert pages.held_bytes(0) == pages.nbytes(KEPT_TOKENS)
    pages.hold(1, 10_000)
    assert pages.held_bytes(0) == 0
    pages.release(1)
    pages.hold(1, 100)  # its slot's next sequence
    assert pages.held_bytes(1) == pages.nbytes(KEPT_TOKENS), "they need not be taken again"


def test_pages_given_back_read_as_zeros() -> None:
    pages, keys, entries = pages_of(2, 20_000)
    pages.hold(0, 20_000)
    fill((keys, entries), 0, 20_000)
    pages.release(0)
    assert keys[:, 0, :KEPT_TOKENS].min() == 1
    assert keys[:, 0, KEPT_TOKENS + 8 : 20_000].max() == 0
    pages.hold(1, 20_000)
    assert keys[:, 0].narrow(1, 0, 100).max() == 0


def test_the_pool_is_what_fits_into_the_room() -> None:
    pages, *_ = pages_of(2)
    tokens = pages.fit(CAPACITY, {HOST: 50_000_000}, None)
    assert pages.nbytes(tokens) <= 50_000_000 < pages.nbytes(tokens + 8)
    assert pages.budget_bytes == pages.nbytes(tokens)
    assert pages.longest(CAPACITY) >= tokens


def test_addresses_that_the_system_refuses_are_an_error_of_one_line() -> None:
    with pytest.raises(BudgetError, match="lower --max-model-len or --max-num-seqs"):
        HostSpace(1 << 60)


@contextmanager
def addresses_limited(nbytes: int) -> Iterator[None]:
    """As `ulimit -v` does it, to so many bytes more than are in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_limit_of_addresses_is_named() -> None:
    with addresses_limited(1 << 28), pytest.raises(BudgetError, match="ulimit -v"):
        pages_of(64)


class Refusing(HostSpace):
    """Memory of a device that has less than was planned."""

    room = 1 << 20

    def take(self, start: int, length: int) -> None:
        if start + length > self.room:
            raise BudgetError("no more memory")


def test_a_device_with_less_memory_than_planned_leaves_the_counts_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages_module, "new_space", lambda nbytes, device: Refusing(nbytes))
    pages = Pages(2)
    pages.reserve((2, CAPACITY // 4, DIM), slot_axis=0, ratio=4, device=HOST)
    pages.reserve((2, CAPACITY, DIM), slot_axis=0, ratio=1, device=HOST)
    pages.hold(0, 100)
    before = pages.taken_bytes
    with pytest.raises(BudgetError, match="no more memory"):
        pages.hold(0, 5000)
    assert pages.taken_bytes == before == pages.held_bytes(0)
    pages.release(0)
    assert pages.taken_bytes == pages.held_bytes(0)
