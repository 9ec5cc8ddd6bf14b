"""Routed experts for training: many tokens, few of them per expert.

A loop over experts is the fast way here: an expert's few hundred tokens and its weights stay in the
core's cache from the first product to the last, and one pass of Python per expert costs
microseconds beside them. (Sorting all tokens into one buffer streams every intermediate value
through memory instead.) Forward and backward are written out, so that nothing is kept but the
hidden activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _by_expert(ids: Tensor, experts: int) -> list[Tensor]:
    """For each expert the flat positions `token * top_k + choice` that chose it."""
    flat = ids.flatten()
    order = flat.argsort()
    return list(order.split(flat.bincount(minlength=experts).tolist()))


def _gate_up(xe: Tensor, w13: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate, up (both before clamping, `[n, width]`), sigmoid of the clamped gate, and the activation."""
    gate, up = (xe @ w13.t()).float().chunk(2, dim=1)
    clamped = gate.clamp(max=limit)
    sigmoid = clamped.sigmoid()
    return gate, up, sigmoid, clamped * sigmoid * up.clamp(-limit, limit)


class RoutedExperts(torch.autograd.Function):
    """sum over chosen experts of weight * W2(silu(min(W1 x, limit)) * clamp(W3 x, -limit, limit)).

    x `[N, hidden]`, weights and ids `[N, top_k]`, w13 `[experts, 2 * width, hidden]` (W1 above W3),
    w2 `[experts, hidden, width]`. Products run in `dtype`, everything else in float32.
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
        groups = _by_expert(ids, w13.shape[0])
        top_k = ids.shape[1]
        low_x, low_w13, low_w2 = x.to(dtype), w13.to(dtype), w2.to(dtype)
        flat_weights = weights.flatten()
        out = torch.zeros_like(x)
        for e, chosen in enumerate(groups):
            if len(chosen):
                tokens = chosen // top_k
                act = _gate_up(low_x[tokens], low_w13[e], limit)[-1]
                y = (act.to(dtype) @ low_w2[e].t()).float()
                out.index_add_(0, tokens, y.mul_(flat_weights[chosen].unsqueeze(1)))
        ctx.save_for_backward(low_x, weights, low_w13, low_w2)
        ctx.groups, ctx.limit = groups, limit
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        low_x, weights, w13, w2 = ctx.saved_tensors
        limit, top_k, dtype = ctx.limit, weights.shape[1], low_x.dtype
        flat_weights = weights.flatten()
        grad_out = grad_out.contiguous()
        grad_x = torch.zeros_like(grad_out)
        grad_weights = torch.zeros_like(flat_weights)
        grad_w13 = torch.zeros(w13.shape)
        grad_w2 = torch.zeros(w2.shape)
        for e, chosen in enumerate(ctx.groups):
            if not len(chosen):
                continue
            tokens = chosen // top_k
            xe = low_x[tokens]
            gate, up, sigmoid, act = _gate_up(xe, w13[e], limit)
            weight = flat_weights[chosen].unsqueeze(1)
            grad_y = grad_out[tokens]
            # back through the weighted sum: act' = W2^T grad serves the weight's gradient too
            grad_act = (grad_y.to(dtype) @ w2[e]).float()  # [n, width], not yet weighted
            grad_weights[chosen] = (grad_act * act).sum(1)
            grad_act.mul_(weight)
            grad_w2[e] = (grad_y * weight).to(dtype).t() @ act.to(dtype)
            clamped, clipped = gate.clamp(max=limit), up.clamp(-limit, limit)
            grad_up = grad_act * (clamped * sigmoid) * (up.abs() <= limit)
            slope = sigmoid * (1 + clamped * (1 - sigmoid))
            grad_gate = grad_act * clipped * slope * (gate <= limit)
            grad_h = torch.cat((grad_gate, grad_up), dim=1).to(dtype)  # [n, 2 * width]
            grad_w13[e] = grad_h.t() @ xe
            grad_x.index_add_(0, tokens, (grad_h @ w13[e]).float())
        return grad_x, grad_weights.view_as(weights), None, grad_w13, grad_w2, None, None
