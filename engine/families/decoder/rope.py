"""Rotary embeddings: which channels of a head turn, how fast, and how that is scaled for longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from engine.layers.rope import YarnScaling, inverse_frequencies

TILE = 128  # rows of FP8 that share a scale


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

    dims               channels of a head that turn: its first ones
    pairs              how the file has a pair's channels: `half`, half of dims apart, or `adjacent`
    attention_factor   what rotated queries and keys are multiplied by, each
    """

    theta: float
    dims: int
    pairs: Literal["half", "adjacent"] = "half"
    scaling: LinearScaling | YarnScaling | Llama3Scaling | None = None
    attention_factor: float = 1.0

    @property
    def frequencies(self) -> torch.Tensor:
        """Radians per position of each channel pair, `[dims / 2]` float64."""
        if isinstance(self.scaling, YarnScaling):
            return inverse_frequencies(self.dims, self.theta, self.scaling)
        frequencies = inverse_frequencies(self.dims, self.theta)
        if isinstance(self.scaling, LinearScaling):
            return frequencies / self.scaling.factor
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)

    def row_order(self, heads: int, head_dim: int) -> torch.Tensor | None:
        """The order of a projection's rows in which each head ends with its pairs, adjacent: `[rows]`.

        So kernels turn them. Queries and keys take the same order, so their products stay what they are. None
        where the file has it.
        """
        half = self.dims // 2
        turning = torch.arange(self.dims)
        if self.pairs == "half":
            turning = turning.view(2, half).t().flatten()
        elif self.dims == head_dim:
            return None
        first = max(self.dims, min(TILE, head_dim))  # rows that share a scale stay together
        channels = torch.cat((torch.arange(first, head_dim), torch.arange(self.dims, first), turning))
        return (torch.arange(heads).unsqueeze(1) * head_dim + channels).flatten()


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by where positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 1.0 + 0.1 * mscale * math.log(factor)
