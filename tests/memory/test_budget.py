"""Budgets as people write them."""

from __future__ import annotations

import pytest
import torch

from memory.budget import MemoryBudget
from quant.errors import BudgetError, ConfigError


@pytest.fixture(autouse=True)
def _ten_gigabytes_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory.budget.available_memory_bytes", lambda: 10 * 10**9)


def test_without_a_word_weights_get_a_share_of_what_is_free() -> None:
    assert MemoryBudget.of_this_machine() == MemoryBudget(7_500_000_000)


def test_virtual_cards_take_their_memory_from_the_host() -> None:
    budget = MemoryBudget.of_this_machine(devices="virtual:1GB@12.5GB/s,virtual:2GB")
    assert budget.dram_bytes == 4_500_000_000
    assert [(t.name, t.budget_bytes, t.link_bytes_per_s) for t in budget.cards] == [
        ("vram:0", 10**9, 12.5e9),
        ("vram:1", 2 * 10**9, None),
    ]
    assert all(card.is_virtual for card in budget.cards)


def test_a_dram_budget_is_taken_as_given() -> None:
    assert MemoryBudget.of_this_machine(dram="1GiB").dram_bytes == 1 << 30


@pytest.mark.parametrize(("dram", "devices"), [("11GB", None), ("9GB", "virtual:2GB"), (None, "virtual:8GB")])
def test_more_than_there_is_is_refused(dram: str | None, devices: str | None) -> None:
    with pytest.raises(BudgetError, match=r"10\.0 GB of memory are free; ask for less"):
        MemoryBudget.of_this_machine(dram, devices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are cards")
def test_cards_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA card 0: the installed PyTorch is built for the CPU"):
        MemoryBudget.of_this_machine(devices="cuda:20GiB")


@pytest.mark.parametrize("text", ["many", "12 parsecs", "-1GB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        MemoryBudget.of_this_machine(dram=text)
