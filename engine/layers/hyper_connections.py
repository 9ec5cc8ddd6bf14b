"""Manifold-constrained hyper-connections (mHC) with the lagged mix of V4.1 (spec section 3).

The residual is `hc` parallel streams. Each sublayer reads one mix of them and writes to all; the
mix it reads with (`pre`) was computed by the sublayer before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.kernels.interface import Kernels


@dataclass(frozen=True)
class Mix:
    """What one sublayer's hyper-connection computed from the streams, for each token.

    pre     `[tokens, hc]`      how the NEXT sublayer's input is mixed
    post    `[tokens, hc]`      how strongly each stream takes the sublayer's output
    combine `[tokens, hc, hc]`  how streams are mixed: new_j gets combine[i, j] of old_i
    """

    pre: torch.Tensor
    post: torch.Tensor
    combine: torch.Tensor


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

    def mix(self, kernels: Kernels, streams: torch.Tensor) -> Mix:
        """Mixing weights from streams `[tokens, hc, hidden]`."""
        tokens, hc, _ = streams.shape
        flat = streams.flatten(1)
        m = kernels.linear(kernels.rms_norm(flat, None, self.norm_eps), self.fn)
        m = m * self.scale + self.base
        gates = kernels.sigmoid(m[:, : 2 * hc])
        combine = kernels.sinkhorn(m[:, 2 * hc :].view(tokens, hc, hc), self.sinkhorn_iters, self.hc_eps)
        return Mix(gates[:, :hc] + self.hc_eps, 2 * gates[:, hc:], combine)


def first_mix(tokens: int, hc: int) -> torch.Tensor:
    """The mix that the first sublayer reads with: stream 0 alone, `[tokens, hc]`."""
    pre = torch.zeros(tokens, hc)
    pre[:, 0] = 1
    return pre
