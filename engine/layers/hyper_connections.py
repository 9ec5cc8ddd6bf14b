"""Manifold-constrained hyper-connections (mHC) of DeepSeek-V4 and V4.1.

The residual is `hc` parallel streams. Each sublayer reads one mix of them and writes to all. The mix that it
reads with (`pre`) is its own in V4; in V4.1 it was computed by the sublayer before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quant.kernels.interface import Kernels

MIXED_TOKENS = 256


@dataclass(frozen=True)
class Mix:
    """What one sublayer's hyper-connection computed from the streams, for each token.

    pre     `[tokens, hc]`      how an input is mixed: V4's own, V4.1's of the next sublayer
    post    `[tokens, hc]`      how strongly each stream takes the sublayer's output
    combine `[tokens, hc, hc]`  how streams are mixed: new_j gets combine[i, j] of old_i
    """

    pre: torch.Tensor
    post: torch.Tensor
    combine: torch.Tensor


@dataclass(frozen=True)
class ReadMix:
    """Weights by which streams are read, and nothing else: fn `[hc, hc*hidden]`, base and scale `[hc]`."""

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    hc_eps: float
    norm_eps: float

    def pre(self, kernels: Kernels, streams: torch.Tensor) -> torch.Tensor:
        """How streams `[tokens, hc * hidden]` are mixed, `[tokens, hc]`."""
        m = kernels.linear(kernels.rms_norm(streams, None, self.norm_eps), self.fn)
        return kernels.sigmoid(m * self.scale + self.base) + self.hc_eps


@dataclass(frozen=True)
class HyperConnection:
    """Weights of one sublayer, float32.

    fn     `[(2+hc)hc, hc*hidden]`: what is read off the normalised streams for pre, post and combine
    base   `[(2+hc)hc]`, added to it
    scale  `[(2+hc)hc]`, by which it is multiplied before: one number for each of the three, spread out
    """

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    sinkhorn_iters: int
    hc_eps: float
    norm_eps: float

    @property
    def reading(self) -> ReadMix:
        """The part that gives `pre`."""
        hc = math.isqrt(len(self.base) + 1) - 1
        return ReadMix(self.fn[:hc], self.base[:hc], self.scale[:hc], self.hc_eps, self.norm_eps)

    def mix(self, kernels: Kernels, streams: torch.Tensor) -> Mix:
        """Mixing weights from streams `[tokens, hc, hidden]`."""
        tokens, hc, _ = streams.shape
        # some at a time: normalised streams are many, and read once, while they are near
        parts = torch.split(streams.flatten(1), MIXED_TOKENS)
        found = [kernels.linear(kernels.rms_norm(part, None, self.norm_eps), self.fn) for part in parts]
        m = (found[0] if len(found) == 1 else torch.cat(found)) * self.scale + self.base
        gates = kernels.sigmoid(m[:, : 2 * hc])
        combine = kernels.sinkhorn(m[:, 2 * hc :].view(tokens, hc, hc), self.sinkhorn_iters, self.hc_eps)
        return Mix(gates[:, :hc] + self.hc_eps, 2 * gates[:, hc:], combine)


def first_mix(tokens: int, hc: int) -> torch.Tensor:
    """The mix that the first sublayer reads with: stream 0 alone, `[tokens, hc]`."""
    pre = torch.zeros(tokens, hc)
    pre[:, 0] = 1
    return pre
