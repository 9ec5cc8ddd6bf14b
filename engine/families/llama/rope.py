"""Rotary frequencies of a Llama, and how they are scaled for longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.layers.rope import YarnScaling, inverse_frequencies


@dataclass(frozen=True)
class LinearScaling:
    """Linear scaling: every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: of slow pairs the frequency is divided by `factor`, of fast ones it is kept.

    A pair is slow if it turns less than `low_turns` times within `original_context` positions, fast if
    more than `high_turns` times; those between are blended by how often they turn.
    """

    factor: float
    original_context: int
    low_turns: float
    high_turns: float

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Stretched `frequencies` `[pairs]` float64."""
        turns = frequencies * self.original_context / (2 * math.pi)
        kept = ((turns - self.low_turns) / (self.high_turns - self.low_turns)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings.

    attention_factor   what rotated queries and keys are multiplied by, each
    """

    theta: float
    scaling: LinearScaling | YarnScaling | Llama3Scaling | None = None
    attention_factor: float = 1.0

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians per position of each channel pair, `[head_dim / 2]` float64."""
        if isinstance(self.scaling, YarnScaling):
            return inverse_frequencies(head_dim, self.theta, self.scaling)
        frequencies = inverse_frequencies(head_dim, self.theta)
        if isinstance(self.scaling, LinearScaling):
            return frequencies / self.scaling.factor
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by where positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 1.0 + 0.1 * mscale * math.log(factor)
