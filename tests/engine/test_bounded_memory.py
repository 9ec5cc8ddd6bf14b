"""What a chunk computes with does not grow with what its sequence already holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.families.base import Batch, Model
from engine.families.deepseek_v41 import eager as v41_eager
from engine.families.loader import load
from engine.families.streams import eager as streams_eager
from engine.layers import sparse_attention
from memory.planner.budget import MemoryBudget
from quant.kernels import torch_layers
from tests.conftest import golden_path
from tests.engine.families.golden_families import family_path

CHUNK = 64
SHORT, LONG = 256, 2048


class Allocations(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, views aside."""

    largest: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors(args)}
        made = func(*args, **(kwargs or {}))
        for t in _tensors((made,)):
            if t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return made


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def largest(model: Model, held: int) -> int:
    """Bytes of the largest tensor that a chunk needs after so many tokens."""
    ids = [3 + i * 7 % 90 for i in range(held + CHUNK)]
    cache = model.new_cache(1, LONG + CHUNK)
    model.forward(Batch.of([(0, 0, ids[:held])]), cache)
    with Allocations() as noted:
        model.forward(Batch.of([(0, held, ids[held:])]), cache)
    return int(noted.largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v41-a", "v41-c", "deepseek_v4"])
def test_a_chunk_after_a_long_prompt_needs_no_more_than_after_a_short_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(path_of(name), MemoryBudget(1 << 30)).model
    try:
        # As many scores as a short prompt's chunk has; a long one's are then made in parts.
        monkeypatch.setattr(sparse_attention, "MOST_SCORES", CHUNK * SHORT)
        monkeypatch.setattr(torch_layers, "GATHERED_VALUES", CHUNK * SHORT)
        assert largest(model, LONG) <= largest(model, SHORT)
    finally:
        model.close()


@pytest.mark.parametrize("name", ["v41-a", "v41-c", "deepseek_v4"])
def test_attention_of_a_few_rows_at_a_time_gives_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(path_of(name), MemoryBudget(1 << 30)).model
    ids = [3 + i * 7 % 90 for i in range(230)]
    parts = [(0, 0, ids[:130]), (1, 0, ids[130:])]
    more = [(1, 100, ids[:60]), (0, 130, ids[130:151])]

    def logits() -> list[torch.Tensor]:
        cache = model.new_cache(2, 256)
        first = Batch.of(parts)
        # late layers compute a prompt's end alone
        ends = Batch(first.ids, first.segments, first.wanted, (0, 0))
        return [
            model.forward(ends, cache),
            model.forward(Batch.of(more, all_logits=True), cache),
            model.forward(Batch.of([(0, 151, [5]), (1, 160, [6])]), cache),
        ]

    try:
        whole = logits()
        for module in (streams_eager, v41_eager):
            monkeypatch.setattr(module, "BLOCK", 24)
        for found, expected in zip(logits(), whole, strict=True):
            assert torch.equal(found, expected)
    finally:
        model.close()


def path_of(name: str) -> Path:
    """Of a golden checkpoint."""
    return golden_path(name) if name.startswith("v41") else family_path(name)
