"""Kernels are compiled before the first request, and nothing of that is seen later."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from engine.families.base import Batch, KvCache, Trace
from engine.families.loader import load
from engine.warm_up import LENGTHS, warm_up
from memory.planner.budget import MemoryBudget
from quant.kernels.cuda.linear import Blocks
from tests.conftest import golden_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_meet_every_size_of_tile(dtype: torch.dtype) -> None:
    used = {Blocks.of(tokens, dtype) for tokens in range(1, 2000)}
    assert {Blocks.of(tokens, dtype) for tokens in LENGTHS} == used


def test_tokens_that_nobody_asked_for_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(golden_path("v41-a"), MemoryBudget(1 << 30)).model
    asked: list[tuple[int, int]] = []
    forward = type(model).forward

    def counting(self: object, batch: Batch, cache: KvCache, trace: Trace | None = None) -> torch.Tensor:
        logits = forward(model, batch, cache, trace)
        asked.append((len(batch.token_ids), len(logits)))
        return logits

    def answer() -> torch.Tensor:
        return forward(model, Batch.of([(0, 0, [5, 6, 7])]), model.new_cache(1, 8))

    before = answer()
    monkeypatch.setattr(type(model), "forward", counting)
    warm_up(model, 40)
    monkeypatch.undo()
    assert asked == [(1, 1), (16, 16), (32, 32)]
    assert torch.equal(answer(), before)
    model.close()
