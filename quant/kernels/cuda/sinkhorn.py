"""Triton: Sinkhorn normalisation of many small matrices, all iterations in one launch.

In torch it takes six operations per iteration, and launching them takes longer than running them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.kernels.cuda.launch import Launch

BLOCK = 32  # matrices of one program


@triton.jit
def doubly_stochastic(c, turns, eps):
    """Logits `[..., N, N]` normalised in turns, as `quant.kernels.Kernels.sinkhorn` says."""
    c = tl.exp(c - tl.max(c, axis=2, keep_dims=True))
    c = c / tl.sum(c, axis=2, keep_dims=True) + eps
    c = c / (tl.sum(c, axis=1, keep_dims=True) + eps)
    for _ in range(1, turns):
        c = c / (tl.sum(c, axis=2, keep_dims=True) + eps)
        c = c / (tl.sum(c, axis=1, keep_dims=True) + eps)
    return c


@triton.jit(do_not_specialize=["count"])
def sinkhorn(logits, out, count, turns, eps, N: tl.constexpr, BLOCK_M: tl.constexpr):
    """out `[count, N, N]` from logits of the same shape."""
    matrix = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.arange(0, N)
    at = matrix[:, None, None] * (N * N) + index[None, :, None] * N + index[None, None, :]
    inside = (matrix < count)[:, None, None]
    c = tl.load(logits + at, mask=inside, other=0.0)
    tl.store(out + at, doubly_stochastic(c, turns, eps), mask=inside)


def sinkhorn_launch(logits: torch.Tensor, out: torch.Tensor, turns: int, eps: float) -> Launch:
    """The launch that normalises `logits` `[tokens, n, n]` float32 into `out`; n is a power of two."""
    count, n, _ = logits.shape
    grid = (-(-count // BLOCK),)
    return Launch(sinkhorn, grid, (logits, out, count, turns, eps), {"N": n, "BLOCK_M": BLOCK}, num_warps=1)
