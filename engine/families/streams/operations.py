"""Operations that a forward on parallel streams is written in, whichever of the families it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self

import torch

from engine.families.streams.config import StreamConfig
from engine.families.streams.weights import StreamAttention
from engine.layers.hyper_connections import HyperConnection
from engine.layers.operations import BasicOperations, Value
from engine.layers.rope import inverse_frequencies
from quant.kernels.interface import Weight

MAX_ROWS = 16  # of a recorded step; larger ones are computed operation by operation


@dataclass(frozen=True)
class StreamMix(Generic[Value]):
    """How streams are read for a sublayer, and its output is written to them.

    pre, post `[rows, hc]`, combine `[rows, hc * hc]`: see `hyper_connections.Mix`
    """

    pre: Value
    post: Value
    combine: Value


# A sublayer's output `[rows, hidden]`, and how it will be written to the streams; None for nothing.
Written = tuple[Value, StreamMix[Value]] | None


@dataclass(frozen=True)
class Frequencies:
    """Radians per position of each channel pair, `[pairs]` float64.

    plain       of layers that see nothing but their window
    compressed  of layers that see compressed entries too, and of these
    """

    plain: torch.Tensor
    compressed: torch.Tensor

    @classmethod
    def by(cls, c: StreamConfig) -> Self:
        """Those of a config."""
        return cls(
            inverse_frequencies(c.qk_rope_head_dim, c.rope_theta),
            inverse_frequencies(c.qk_rope_head_dim, c.compress_rope_theta, c.yarn),
        )

    def of(self, *, compressed: bool) -> torch.Tensor:
        """Those of one kind of layer."""
        return self.compressed if compressed else self.plain


class StreamOperations(BasicOperations[Value], Protocol[Value]):
    """Streams are `[rows, hc * hidden]`."""

    def at_layer(self, number: int | None) -> None:
        """What follows is layer `number`'s, or no layer's."""
        ...

    def move(self, device: torch.device, *values: Value) -> Sequence[Value]:
        """Values on a device."""
        ...

    def mix(self, connection: HyperConnection, streams: Value) -> StreamMix[Value]:
        """What a sublayer's hyper-connection makes of the streams."""
        ...

    def read_streams(self, streams: Value, pre: Value) -> Value:
        """sum_i pre_i * stream_i."""
        ...

    def write_streams(self, streams: Value, y: Value, mix: StreamMix[Value]) -> Value:
        """post_j * y + sum_i combine[i, j] * stream_i."""
        ...

    def rotate(self, x: Value, heads: int, *, compressed: bool, backwards: bool = False) -> Value:
        """Heads turned by their rows' positions."""
        ...

    def by_rows(self, work: Callable[[Value], Value], x: Value) -> Value:
        """work(x), perhaps of some rows at a time: attention, whose operations know which rows these are."""
        ...

    def each_rows(self, work: Callable[[Value], None], x: Value) -> None:
        """The same of what makes nothing but state."""
        ...

    def blocks(self, x: Value, weights: Sequence[Weight]) -> Value:
        """Weights of one shape, each times its own columns of x, side by side."""
        ...

    def select(self, number: int, queries: Value, weights: Value) -> None:
        """Choose which entries each token attends to, from this layer until another one chooses."""
        ...

    def attend(self, number: int, attn: StreamAttention, q: Value, kv: Value) -> Value:
        """Latents stored in the layer's window, then attention over it and over entries: those chosen, or all
        where no layer chooses."""
        ...

    def acquire(self, number: int, ids: Value) -> None:
        """Begin the layer's routed experts: missing ones are on their way from now on."""
        ...

    def experts(self, number: int, x: Value, ids: Value, weights: Value) -> Value:
        """The weighted sum of the chosen experts' outputs."""
        ...

    def trace(self, name: str, value: Value, *shape: int) -> None:
        """Keep a value for whoever asked for it, each row in that shape."""
        ...
