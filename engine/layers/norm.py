"""RMSNorm."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; `[..., dim]` to the same."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
