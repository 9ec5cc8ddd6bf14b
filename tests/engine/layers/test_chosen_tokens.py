"""Which tokens an indexer chooses: the best of those that a token sees, however many scores fit in memory."""

from __future__ import annotations

import pytest
import torch

from engine.layers import sparse_attention
from engine.layers.sparse_attention import choose_tokens
from quant.formats.rows import Rows
from quant.kernels.choice import choose
from quant.kernels.interface import Kernels
from quant.kernels.reference import ReferenceKernels

LENGTH, BEFORE, HEADS, DIM, TOP_K = 40, 30, 32, 24, 16  # with few heads, some score exactly 0


def inputs(length: int = LENGTH, before: int = BEFORE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = ((length, HEADS, DIM), (length, HEADS), (before + length, DIM))
    queries, weights, keys = (torch.randn(shape, generator=draw) for shape in shapes)
    return queries, weights, keys


def best(queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> list[set[int]]:
    """By the formula, for each token."""
    scores = ((queries.double() @ keys.double().T).relu() * weights.double().unsqueeze(-1)).sum(1)
    first = len(keys) - len(queries) + 1
    return [
        set(row[: first + n].topk(min(TOP_K, first + n)).indices.tolist()) for n, row in enumerate(scores)
    ]


@pytest.mark.parametrize("kernels", [choose(), ReferenceKernels()], ids=lambda kernels: kernels.name)
@pytest.mark.parametrize(("length", "before"), [(40, 30), (40, 0), (1, 5), (1, 15), (1, 16), (7, 12)])
def test_a_token_sees_the_best_of_itself_and_those_before_it(
    kernels: Kernels, length: int, before: int
) -> None:
    found = choose_tokens(kernels, *inputs(length, before), TOP_K)

    assert found.shape == (length, TOP_K)
    assert [set(row[row >= 0].tolist()) for row in found] == best(*inputs(length, before))
    assert ((found >= 0).sum(1) == torch.arange(before + 1, before + length + 1).clamp(max=TOP_K)).all()


def test_scores_are_made_of_as_many_tokens_at_a_time_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(ReferenceKernels):
        def __init__(self) -> None:
            super().__init__()
            self.scores: list[int] = []

        def index_scores(
            self,
            queries: torch.Tensor,
            weights: torch.Tensor,
            keys: Rows,
            visible: torch.Tensor,
            entries: torch.Tensor | None = None,
        ) -> torch.Tensor:
            self.scores.append(queries.shape[0] * keys.shape[0])
            return super().index_scores(queries, weights, keys, visible, entries)

    whole, most, kernels = choose_tokens(ReferenceKernels(), *inputs(), TOP_K), 600, Counting()
    monkeypatch.setattr(sparse_attention, "MOST_SCORES", most)

    assert torch.equal(choose_tokens(kernels, *inputs(), TOP_K), whole)
    assert max(kernels.scores) <= most
    assert len(kernels.scores) == 5
    assert sum(kernels.scores) == LENGTH * (LENGTH + BEFORE)
