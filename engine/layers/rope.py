"""Rotary embeddings on interleaved pairs, with YaRN's stretched frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from quant.kernels.interface import Kernels


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): which frequencies are divided by `factor`, which are kept.

    A pair that turns more than `beta_fast` times within `original_context` positions is kept, one
    that turns less than `beta_slow` times is divided, those between are blended; where they begin and end is
    rounded to whole pairs, or not (`is_rounded`).
    """

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    is_rounded: bool = True


def inverse_frequencies(dim: int, theta: float, yarn: YarnScaling | None = None) -> torch.Tensor:
    """Radians per position of each channel pair, `[dim / 2]` float64."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequencies = theta**-exponents
    if yarn is None:
        return frequencies

    def pair_turning(turns: float) -> float:
        return dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.is_rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / yarn.factor * stretched


@dataclass(frozen=True)
class Rotation:
    """e^(i * angle) for some positions, `[tokens, dim / 2]` complex64; angles are computed in float64."""

    turns: torch.Tensor

    @classmethod
    def at(cls, kernels: Kernels, positions: torch.Tensor, frequencies: torch.Tensor) -> Rotation:
        """The rotation of `positions` `[tokens]` int64, by frequencies `[dim / 2]` float64."""
        return cls(kernels.turns(positions, frequencies))

    def times(self, factor: float) -> Rotation:
        """One that also multiplies what it turns."""
        if factor == 1:
            return self
        return Rotation(torch.view_as_complex(torch.view_as_real(self.turns) * factor))

    def to(self, device: torch.device) -> Rotation:
        """The same on `device`."""
        return Rotation(self.turns.to(device))

    @cached_property
    def inverse(self) -> Rotation:
        """The rotation that undoes this one."""
        return Rotation(torch.conj_physical(self.turns))

    def apply(self, kernels: Kernels, x: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        """Rotate the last `dim` channels of x `[tokens, ..., channels]`; the others pass through."""
        return kernels.rotate(x, self.turns, in_place=in_place)
