"""Attention and index scores over packed rows, a block of queries at a time.

A block sees the window before it, and compressed entries from the beginning of the oldest document
that reaches into it. So the cost per token depends on how long documents are, not rows, and a
block's scores stay in the cache from the first product to the last. Backward passes are written
out: autograd would keep far more, and sum full-sized gradients block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One block of queries: tokens start..stop of row `row`, who may see entries first..last of a source."""

    row: int
    start: int
    stop: int
    first: int
    last: int


def spans_of(documents: Tensor, window: int, ratio: int) -> list[Span]:
    """Every block of packed rows `[B, T]`, with the entries (one per `ratio` tokens, 0: none) it may need."""
    spans = []
    for row, numbers in enumerate(documents.tolist()):
        begins: dict[int, int] = {}
        for place, number in enumerate(numbers):
            begins.setdefault(number, place)
        for start in range(0, len(numbers), window):
            stop = start + window
            oldest = next((number for number in numbers[start:stop] if number >= 0), None)
            last = stop // ratio if ratio else 0
            first = last if oldest is None or not ratio else begins[oldest] // ratio
            spans.append(Span(row, start, stop, first, last))
    return spans


class BlockAttention(torch.autograd.Function):
    """Attention over a window and compressed entries, with a sink.

    q `[B, T, heads, dim]` (scaled), kv `[B, T, dim]`, entries `[B, G, dim]`, sink `[heads]`;
    window_bias `[B, T, 2 * window]` for the keys of the block before and this one, selection
    `[B, T, G]`, both 0 or very negative. Returns the output like q, and for each token the weights on
    entries summed over heads, `[B, T, G]`. Products run in `dtype`.

    No query's window reaches the first key of the block before, so the sink takes its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        entries: Tensor,
        sink: Tensor,
        window_bias: Tensor,
        selection: Tensor,
        spans: list[Span],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        window = spans[0].stop - spans[0].start
        q, kv, entries = q.to(dtype), kv.to(dtype), entries.to(dtype)
        out = torch.empty(q.shape)
        attended = torch.zeros_like(selection)
        kept = []
        for span in spans:
            b, block = span.row, slice(span.start, span.stop)
            keys = _keys_of(kv, entries, span, window)
            scores = (q[b, block].flatten(0, 1) @ keys.t()).float().view(window, -1, len(keys))
            scores[..., : 2 * window] += window_bias[b, block].unsqueeze(1)
            scores[..., 2 * window :] += selection[b, block, span.first : span.last].unsqueeze(1)
            scores[..., 0] = sink
            weights = scores.softmax(-1)
            attended[b, block, span.first : span.last] = weights[..., 2 * window :].sum(1)
            low = weights.to(dtype)
            out[b, block] = (low.flatten(0, 1) @ keys).float().view(window, -1, keys.shape[1])
            kept.append(low)
        ctx.save_for_backward(q, kv, entries, *kept)
        ctx.spans = spans
        ctx.mark_non_differentiable(attended)
        return out, attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, entries, *kept = ctx.saved_tensors
        spans: list[Span] = ctx.spans
        window, dtype, heads = spans[0].stop - spans[0].start, q.dtype, q.shape[2]
        grad_q, grad_kv, grad_entries = (
            torch.empty(q.shape),
            torch.zeros(kv.shape),
            torch.zeros(entries.shape),
        )
        grad_sink = torch.zeros(heads)
        for span, weights in zip(spans, kept, strict=True):
            b, block = span.row, slice(span.start, span.stop)
            keys = _keys_of(kv, entries, span, window)
            asked = q[b, block].flatten(0, 1)  # [window * heads, dim]
            back = grad[b, block].flatten(0, 1).to(dtype)
            towards = (back @ keys.t()).float().view(weights.shape)
            grad_scores = torch._softmax_backward_data(towards, weights.float(), -1, torch.float32)
            grad_sink += grad_scores[..., 0].sum(0)
            grad_scores[..., 0] = 0
            low = grad_scores.to(dtype).flatten(0, 1)
            grad_q[b, block] = (low @ keys).float().view(window, heads, -1)
            grad_keys = (low.t() @ asked).float() + (weights.flatten(0, 1).t() @ back).float()
            grad_keys[0] = 0
            if span.start:
                grad_kv[b, span.start - window : span.start] += grad_keys[:window]
            grad_kv[b, block] += grad_keys[window : 2 * window]
            grad_entries[b, span.first : span.last] += grad_keys[2 * window :]
        return grad_q, grad_kv, grad_entries, grad_sink, None, None, None, None


def _keys_of(kv: Tensor, entries: Tensor, span: Span, window: int) -> Tensor:
    """The sink's zero, the window's latents and the entries of a block, `[2 * window + entries, dim]`."""
    before = (
        kv[span.row, span.start - window : span.start] if span.start else torch.zeros_like(kv[0, :window])
    )
    here = kv[span.row, span.start : span.stop]
    return torch.cat(
        (torch.zeros_like(here[:1]), before[1:], here, entries[span.row, span.first : span.last])
    )


class IndexScores(torch.autograd.Function):
    """score[t, g] = sum_h weight[t, h] * relu(query[t, h] . key[g]), `[B, T, G]`; 0 outside the spans.

    queries `[B, T, heads, dim]`, weights `[B, T, heads]`, keys `[B, G, dim]`. Products run in `dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, weights: Tensor, keys: Tensor, spans: list[Span], dtype: torch.dtype
    ) -> Tensor:
        queries, keys = queries.to(dtype), keys.to(dtype)
        scores = torch.zeros(*queries.shape[:2], keys.shape[1])
        for span in spans:
            b, block, seen = span.row, slice(span.start, span.stop), slice(span.first, span.last)
            dots = _dots(queries[b, block], keys[b, seen]).relu_()
            scores[b, block, seen] = (dots * weights[b, block].unsqueeze(-1)).sum(1)
        ctx.save_for_backward(queries, weights, keys)
        ctx.spans = spans
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, weights, keys = ctx.saved_tensors
        grad_queries, grad_keys = torch.zeros(queries.shape), torch.zeros(keys.shape)
        grad_weights = torch.zeros_like(weights)
        for span in ctx.spans:
            b, block, seen = span.row, slice(span.start, span.stop), slice(span.first, span.last)
            q, k = queries[b, block], keys[b, seen]
            dots = _dots(q, k).relu_()  # [block, heads, entries]; computed again rather than kept
            wanted = grad[b, block, seen].unsqueeze(1)
            grad_weights[b, block] = (dots * wanted).sum(-1)
            grad_dots = (
                (dots.sign_() * wanted).mul_(weights[b, block].unsqueeze(-1)).to(q.dtype).flatten(0, 1)
            )
            grad_queries[b, block] = (grad_dots @ k).float().view(q.shape)
            grad_keys[b, seen] += (grad_dots.t() @ q.flatten(0, 1)).float()
        return grad_queries, grad_weights, grad_keys, None, None


def _dots(queries: Tensor, keys: Tensor) -> Tensor:
    """`[block, heads, dim]` and `[entries, dim]` -> `[block, heads, entries]` float32."""
    return (queries.flatten(0, 1) @ keys.t()).float().view(*queries.shape[:2], -1)
