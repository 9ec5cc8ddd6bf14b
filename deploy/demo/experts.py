"""Routed experts for training: many tokens, few of them per expert.

Tokens are sorted by expert once; then a loop over experts makes each product, with one expert's few
hundred tokens and its weights in the core's cache. Forward and backward are written out, so that
nothing is kept but inputs and the products before the activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layers import fused


@fused
def activation(h: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); h `[n, 2 * width]` holds gate beside up."""
    gate, up = h.float().chunk(2, dim=1)
    clamped = gate.clamp(max=limit)
    return (clamped * clamped.sigmoid() * up.clamp(-limit, limit)).to(h.dtype)


@fused
def activation_backward(
    h: Tensor, grad_act: Tensor, weight: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The activation again, the gradients of the weights `[n, 1]`, and that of h.

    grad_act `[n, width]` is W2^T grad, not yet weighted, so that it serves the weights' gradient too.
    """
    gate, up = h.float().chunk(2, dim=1)
    clamped, clipped = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = clamped.sigmoid()
    act = clamped * sigmoid * clipped
    grad = grad_act.float()
    grad_weight = (grad * act).sum(1, keepdim=True)
    grad = grad * weight
    grad_up = grad * (clamped * sigmoid) * (up.abs() <= limit)
    grad_gate = grad * clipped * (sigmoid * (1 + clamped * (1 - sigmoid))) * (gate <= limit)
    return act.to(h.dtype), grad_weight, torch.cat((grad_gate, grad_up), dim=1).to(h.dtype)


class RoutedExperts(torch.autograd.Function):
    """sum over chosen experts of weight * W2(silu(min(W1 x, limit)) * clamp(W3 x, -limit, limit)).

    x `[N, hidden]`, weights and ids `[N, top_k]`, w13 `[experts, 2 * width, hidden]` (W1 above W3),
    w2 `[experts, hidden, width]`. Products run in `dtype`, sums over the choices in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        w13: Tensor,
        w2: Tensor,
        limit: float,
        dtype: torch.dtype,
    ) -> Tensor:
        tokens, top_k = ids.shape
        order = ids.flatten().argsort(stable=True)  # places `token * top_k + choice`, expert by expert
        counts = ids.flatten().bincount(minlength=len(w13)).tolist()
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        low_w13, low_w2 = w13.to(dtype), w2.to(dtype)
        xs = x.to(dtype)[order // top_k]  # [N * top_k, hidden], sorted like all that follows
        h = xs.new_empty(len(order), w13.shape[1])
        y = torch.empty_like(xs)
        for e, part in _parts(counts):
            torch.mm(xs[part], low_w13[e].t(), out=h[part])
            torch.mm(activation(h[part], limit), low_w2[e].t(), out=y[part])
        ctx.save_for_backward(weights, low_w13, low_w2, order, places, xs, h)
        ctx.counts, ctx.limit = counts, limit
        return torch.einsum("nk,nkd->nd", weights, y[places].view(tokens, top_k, -1).float())

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weights, w13, w2, order, places, xs, h = ctx.saved_tensors
        tokens, top_k = weights.shape
        grad_y = grad_out.to(xs.dtype)[order // top_k]  # not yet weighted
        sorted_weights = weights.flatten()[order].unsqueeze(1)
        grad_weights = torch.empty_like(sorted_weights)
        grad_x = torch.empty_like(xs)
        grad_w13, grad_w2 = torch.zeros_like(w13), torch.zeros_like(w2)
        for e, part in _parts(ctx.counts):
            weight = sorted_weights[part]
            act, grad_weights[part], grad_h = activation_backward(
                h[part], grad_y[part] @ w2[e], weight, ctx.limit
            )
            torch.mm((grad_y[part] * weight.to(xs.dtype)).t(), act, out=grad_w2[e])
            torch.mm(grad_h.t(), xs[part], out=grad_w13[e])
            torch.mm(grad_h, w13[e], out=grad_x[part])
        summed = grad_x[places].view(tokens, top_k, -1).float().sum(1)
        by_choice = grad_weights[places].view_as(weights)
        return summed, by_choice, None, grad_w13.float(), grad_w2.float(), None, None


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its stretch of the sorted tokens) for every expert that has any."""
    parts, begin = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(begin, begin + count)))
        begin += count
    return parts
