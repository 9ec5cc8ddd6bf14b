"""Prompts and greedy answers of one sequence, for what compares them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.families.base import Batch, KvCache, Model

CHUNK = 512


def prefill(model: Model, cache: KvCache, ids: Sequence[int]) -> torch.Tensor:
    """Compute a prompt in slot 0, which is empty: the logits behind it, `[vocab]`."""
    cache.reset(0)
    logits = torch.empty(0)
    for start in range(0, len(ids), CHUNK):
        logits = model.forward(Batch.of([(0, start, ids[start : start + CHUNK])]), cache)
    return logits[-1]


def greedy(model: Model, cache: KvCache, ids: Sequence[int], tokens: int) -> list[int]:
    """The `tokens` likeliest tokens behind a prompt, one after the other, whatever they are."""
    found = [int(prefill(model, cache, ids).argmax())]
    while len(found) < tokens:
        batch = Batch.of([(0, len(ids) + len(found) - 1, found[-1:])])
        found.append(int(model.forward(batch, cache)[-1].argmax()))
    return found
