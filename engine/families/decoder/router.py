"""Which experts tokens use, by softmax or sigmoid scores: a pure function of a router's logits."""

from __future__ import annotations

import torch

from engine.families.decoder.description import Router
from quant.kernels.interface import Kernels


def choose_experts(
    kernels: Kernels, router: Router, logits: torch.Tensor, choice_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts that logits `[tokens, experts]` choose, best first, and their weights; `[tokens, top_k]`.

    choice_bias `[experts]` decides with the scores which are chosen. Of equal scores the first expert wins.
    """
    if router.score == "chosen softmax":
        best, chosen = _best(logits, router.top_k)
        return chosen, best.softmax(-1) * router.factor
    scores = logits.softmax(-1) if router.score == "softmax" else kernels.sigmoid(logits)
    ranks = scores if choice_bias is None else scores + choice_bias
    if router.groups is not None:
        count, kept, best_of = router.groups.count, router.groups.kept, router.groups.best
        grouped = ranks.view(len(ranks), count, -1)
        values = grouped.topk(best_of, dim=-1).values.sum(-1)  # [tokens, groups]
        _, groups = _best(values, kept)
        is_out = torch.ones_like(values, dtype=torch.bool).scatter_(1, groups, False)
        ranks = grouped.masked_fill(is_out.unsqueeze(-1), -torch.inf).view(ranks.shape)
    _, chosen = _best(ranks, router.top_k)
    weights = scores.gather(1, chosen)
    if router.is_renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + router.epsilon)
    return chosen, weights * router.factor


def _best(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row, falling, and their columns; the first of equal ones."""
    ordered, columns = values.sort(dim=-1, descending=True, stable=True)
    return ordered[:, :count], columns[:, :count]
