"""The indexer's scores for whole rows, a block of tokens at a time (spec section 4.4).

All heads' dot products with all entries would be the largest tensor of the model. In blocks they
stay in the cache, entries that lie ahead of a block are never computed, and the backward pass
computes them again instead of keeping them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64


class IndexScores(torch.autograd.Function):
    """score[t, g] = sum_h weight[t, h] * relu(query[t, h] . key[g]), `[B, T, G]`; 0 for entries ahead.

    queries `[B, T, heads, dim]`, weights `[B, T, heads]`, keys `[B, G, dim]`, one entry per `ratio`
    tokens. Products run in `dtype`.
    """

    @staticmethod
    def forward(
        ctx, queries: Tensor, weights: Tensor, keys: Tensor, ratio: int, dtype: torch.dtype
    ) -> Tensor:
        low_queries, low_keys = queries.to(dtype), keys.to(dtype)
        scores = queries.new_zeros(*queries.shape[:2], keys.shape[1])
        for b, block, ahead in _blocks(queries.shape[0], queries.shape[1], ratio):
            dots = _dots(low_queries[b, block], low_keys[b, :ahead])
            scores[b, block, :ahead] = (dots.relu_() * weights[b, block].unsqueeze(-1)).sum(1)
        ctx.save_for_backward(low_queries, weights, low_keys)
        ctx.ratio = ratio
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, weights, keys = ctx.saved_tensors
        grad_queries = torch.zeros(queries.shape)
        grad_weights = torch.zeros_like(weights)
        grad_keys = torch.zeros(keys.shape)
        for b, block, ahead in _blocks(queries.shape[0], queries.shape[1], ctx.ratio):
            q, k = queries[b, block], keys[b, :ahead]
            dots = _dots(q, k).relu_()  # [block, heads, ahead]
            wanted = grad[b, block, :ahead].unsqueeze(1)
            grad_weights[b, block] = (dots * wanted).sum(-1)
            grad_dots = (
                (dots.sign_() * wanted).mul_(weights[b, block].unsqueeze(-1)).to(q.dtype).flatten(0, 1)
            )
            grad_queries[b, block] = (grad_dots @ k).float().view(q.shape)
            grad_keys[b, :ahead] += (grad_dots.t() @ q.flatten(0, 1)).float()
        return grad_queries, grad_weights, grad_keys, None, None


def _blocks(batch: int, length: int, ratio: int) -> list[tuple[int, slice, int]]:
    """(row, tokens of a block, entries complete by its end) for every block."""
    return [
        (b, slice(start, min(start + BLOCK, length)), min(start + BLOCK, length) // ratio)
        for b in range(batch)
        for start in range(0, length, BLOCK)
    ]


def _dots(queries: Tensor, keys: Tensor) -> Tensor:
    """`[block, heads, dim]` and `[entries, dim]` -> `[block, heads, entries]` float32."""
    return (queries.flatten(0, 1) @ keys.t()).float().view(*queries.shape[:2], -1)
