"""Arenas stay within their tier's budget and hand out each slot once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory.tiers import ALIGNMENT, Arena, Tier
from quant.errors import BudgetError


def tier(budget_bytes: int) -> Tier:
    return Tier("dram", budget_bytes, torch.device("cpu"))


@given(budget=st.integers(0, 100_000), slot=st.integers(1, 5000), most=st.integers(0, 50))
def test_an_arena_never_exceeds_its_budget(budget: int, slot: int, most: int) -> None:
    arena = Arena.filling(tier(budget), slot, most)
    assert arena.nbytes <= budget
    assert arena.slots <= most
    aligned = -(-slot // ALIGNMENT) * ALIGNMENT
    assert arena.slots == most or arena.nbytes + aligned > budget


def test_an_arena_over_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="3 slots of 128 bytes exceed its budget of 383 bytes"):
        Arena(tier(383), 3, 100)


def test_slots_do_not_overlap() -> None:
    arena = Arena(tier(10_000), 4, 100)
    numbers = [arena.take() for _ in range(4)]
    assert arena.take() is None
    for number in numbers:
        assert number is not None
        arena.slot(number).fill_(number + 1)
    assert [int(arena.slot(n).float().mean()) for n in range(4)] == [1, 2, 3, 4]
    assert arena.slot(0).shape == (100,)


def test_a_slot_given_back_is_handed_out_again() -> None:
    arena = Arena(tier(1000), 2, 64)
    first, second = arena.take(), arena.take()
    assert first is not None
    arena.give_back(first)
    assert arena.free == 1
    assert arena.take() == first
    assert second != first


def test_memory_that_may_not_be_page_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("memory.tiers.lock_pages", lambda memory: "out of memory")
    arena = Arena(tier(10_000), 4, 100, pinned=True)
    assert arena.nbytes == 4 * 128
    assert "cannot be page-locked (out of memory)" in caplog.text
    assert "ulimit -l" in caplog.text
    arena.slot(3).fill_(7)
    arena.close()
