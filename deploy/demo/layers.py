"""Small pieces that every part of the training model uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantise import straight_through


class Precision:
    """In which dtype matrix products run; sums, norms, softmaxes and mixes are float32 always.

    bfloat16 products take half the time on CPUs that have them in hardware (AVX-512 BF16, AMX).
    """

    products = torch.float32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, float32."""
    if Precision.products == torch.float32:
        return F.linear(x, weight)
    return F.linear(x.to(Precision.products), weight.to(Precision.products)).float()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched a b, float32."""
    if Precision.products == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a.to(Precision.products), b.to(Precision.products)).float()


class Linear(nn.Module):
    """A matrix without bias that knows how it will be stored: `fp8` tiles, `bf16` or `fp32`.

    While `rounding` is on, its products use the stored values and the gradient passes straight through.
    """

    def __init__(self, inputs: int, outputs: int, stored_as: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.stored_as = stored_as
        self.rounding = False

    def matrix(self) -> Tensor:
        """The weight as products see it, `[outputs, inputs]`."""
        return straight_through(self.weight, self.stored_as) if self.rounding else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix())


class RmsNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight; stored in bf16."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.rounding = False

    def forward(self, x: Tensor) -> Tensor:
        weight = straight_through(self.weight, "bf16") if self.rounding else self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight


class Embedding(nn.Module):
    """Token vectors; stored in bf16."""

    def __init__(self, vocab_size: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim) * std)
        self.rounding = False

    def forward(self, ids: Tensor) -> Tensor:
        weight = straight_through(self.weight, "bf16") if self.rounding else self.weight
        return F.embedding(ids, weight)


class SoftmaxWithSink(torch.autograd.Function):
    """softmax over the last axis whose denominator gains exp(sink_h).

    scores `[n, W, heads, S]` (overwritten), bias `[n, W, 1, S]`, sink `[heads]`. Place 0 of the last
    axis stands for the sink: its score is replaced, and its key and value must be zero.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        scores = scores.add_(bias)
        scores[..., 0] = sink
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        grad_scores = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
        grad_sink = grad_scores[..., 0].sum((0, 1))
        grad_scores[..., 0] = 0
        return grad_scores, None, grad_sink
