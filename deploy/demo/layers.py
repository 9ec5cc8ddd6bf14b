"""Small pieces that every part of the training model uses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantise import straight_through


class Precision:
    """In which dtype matrix products run; sums, norms, softmaxes and mixes are float32 always.

    bfloat16 products take half the time on CPUs that have them in hardware (AVX-512 BF16, AMX).
    """

    products = torch.float32


P = ParamSpec("P")
R = TypeVar("R")


class Fusion:
    """Whether chains of small operations are compiled into one loop each; `train.py` turns it on.

    It makes steps shorter, after a minute or two of compiling.
    """

    on = False


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled while `Fusion.on`.

    What lies between arguments and results must be float32: the compiler may drop a rounding to bfloat16
    and back, so rounded weights come in as arguments.
    """
    compiled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not Fusion.on:
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=True))
        return compiled[0](*args, **kwargs)

    return call


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, float32."""
    if Precision.products == torch.float32:
        return F.linear(x, weight)
    return F.linear(x.to(Precision.products), weight.to(Precision.products)).float()


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


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class RmsNorm(nn.Module):
    """`rms_norm` with a weight that is stored in bf16."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.rounding = False

    def forward(self, x: Tensor) -> Tensor:
        weight = straight_through(self.weight, "bf16") if self.rounding else self.weight
        return rms_norm(x, weight, self.eps)


class Embedding(nn.Module):
    """Token vectors; stored in bf16."""

    def __init__(self, vocab_size: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim) * std)
        self.rounding = False

    def forward(self, ids: Tensor) -> Tensor:
        weight = straight_through(self.weight, "bf16") if self.rounding else self.weight
        return F.embedding(ids, weight)
