"""What V4's forward is written in: operations on streams, windows, entries of each layer's own, and experts.

`eager.py` computes them at once, for prompts, on GPUs and where something is to be traced; `recorded.py`
notes them for a program that decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from engine.families.deepseek_v4.config import V4Config
from engine.families.deepseek_v4.weights import Compressor, V4Weights
from engine.families.streams.operations import Frequencies, StreamOperations
from engine.layers.hyper_connections import ReadMix
from engine.layers.operations import Value
from quant.kernels.interface import Kernels
from quant.kernels.layers import RoutingRule


@dataclass(frozen=True)
class V4Parts:
    """What operations need of a loaded model."""

    config: V4Config
    weights: V4Weights
    kernels: Kernels

    @cached_property
    def frequencies(self) -> Frequencies:
        """What positions are turned by."""
        return Frequencies.by(self.config)


class V4Operations(StreamOperations[Value], Protocol[Value]):
    """And what V4 alone has."""

    def streams(self, x: Value, n: int) -> Value:
        """x in n streams."""
        ...

    def capture(self, streams: Value) -> None:
        """Keep the mean of the streams, which draft stages read."""
        ...

    def reading(self, mix: ReadMix, streams: Value) -> Value:
        """How streams are read, `[rows, hc]`."""
        ...

    def norm_heads(self, x: Value, weight: torch.Tensor, eps: float) -> Value:
        """RMSNorm of each head by itself; weight `[head_dim]`."""
        ...

    def compress(self, number: int, kind: int, compressor: Compressor, x: Value) -> None:
        """Append the entries of one kind (see `V4Config.groups`) whose groups these tokens complete."""
        ...

    def by_token(self, number: int, table: torch.Tensor) -> Value:
        """The experts that the tokens' ids choose, `[rows, top_k]`, from a table `[vocab, top_k]`."""
        ...

    def weigh(self, logits: Value, ids: Value, rule: RoutingRule) -> Value:
        """The weights of experts that were not chosen by the logits: see `LayerOperations.weigh`."""
        ...

    def wants_guesses(self, number: int) -> bool:
        """Whether it can help to predict layer `number`'s experts."""
        ...

    def prefetch(self, number: int, ids: Value) -> None:
        """Start prefetching the experts that layer `number` will probably need, or will for certain."""
        ...
