"""RMSNorm."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; `[..., dim]` to the same."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
