"""What a forward is written in: the operations of a layer, computed at once or noted for later.

A family writes its layers once, over values that are tensors (`Eager`: prompts, and where nothing can be
recorded) or buffers of a program (`Recorded`: decoding). Both run the same kernels and give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from engine.families.base import Segment
from engine.layers.rope import Rotation
from quant.kernels.cpu.program import Buffer, KvPlace, Recorder
from quant.kernels.interface import Kernels, Weight

Value = TypeVar("Value")

# Stores keys and values `[length, kv_heads, head_dim]` of a layer's segment; returns all that its slot then
# holds, `[kv_heads, end, head_dim]` each.
Extend = Callable[[int, Segment, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Operations(Protocol[Value]):
    """Values are `[rows, width]` float32."""

    def norm(self, x: Value, weight: torch.Tensor, eps: float) -> Value:
        """RMSNorm."""
        ...

    def linears(self, x: Value, *weights: Weight) -> list[Value]:
        """`x @ weight^T` for each weight."""
        ...

    def rotate(self, x: Value, heads: int) -> Value:
        """Heads turned by their rows' positions."""
        ...

    def attend(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """Keys and values appended to the layer's cache, then causal attention of the queries over it."""
        ...

    def gated(self, gate: Value, up: Value) -> Value:
        """silu(gate) * up."""
        ...

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        ...

    def scale(self, x: Value, factor: float) -> Value:
        """x * factor."""
        ...


class Eager:
    """`Operations` on tensors, computed at once, for the tokens of some segments."""

    def __init__(
        self, kernels: Kernels, segments: Sequence[Segment], rotation: Rotation, head_dim: int, extend: Extend
    ) -> None:
        self._kernels = kernels
        self._segments = segments
        self._rotation = rotation
        self._head_dim = head_dim
        self._extend = extend

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._kernels.rms_norm(x, weight, eps)

    def linears(self, x: torch.Tensor, *weights: Weight) -> list[torch.Tensor]:
        return [self._kernels.linear(x, weight) for weight in weights]

    def rotate(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return self._rotation.apply(self._kernels, self._heads(x)).view(x.shape)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        queries, attended = self._heads(q), self._heads(out)
        keys, values = self._heads(k), self._heads(v)
        stop = 0
        for segment in self._segments:
            start, stop = stop, stop + segment.length
            held = self._extend(layer, segment, keys[start:stop], values[start:stop])
            attended[start:stop] = self._kernels.attend(queries[start:stop], *held)
        return out

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._kernels.gated(gate, up, float("inf"))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, heads * head_dim]` as `[tokens, heads, head_dim]`."""
        return x.view(x.shape[0], -1, self._head_dim)


class Recorded:
    """`Operations` noted by a recorder: each row is the newest token of a sequence of its own.

    turns   `[positions, head_dim / 2]` complex64, the rotation of every position
    places  where each layer's keys and values lie
    """

    def __init__(self, recorder: Recorder, turns: torch.Tensor, places: Sequence[KvPlace]) -> None:
        self._recorder = recorder
        self._turns = turns
        self._places = places

    def norm(self, x: Buffer, weight: torch.Tensor, eps: float) -> Buffer:
        return self._recorder.norm(x, weight, eps)

    def linears(self, x: Buffer, *weights: Weight) -> list[Buffer]:
        return self._recorder.linears(x, weights)

    def rotate(self, x: Buffer, heads: int) -> Buffer:
        return self._recorder.rotate(x, self._turns, heads)

    def attend(self, layer: int, q: Buffer, k: Buffer, v: Buffer) -> Buffer:
        place = self._places[layer]
        self._recorder.append(k, v, place)
        return self._recorder.attend(q, place)

    def gated(self, gate: Buffer, up: Buffer) -> Buffer:
        return self._recorder.gated(gate, up, float("inf"))

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        return self._recorder.add(x, y)

    def scale(self, x: Buffer, factor: float) -> Buffer:
        return self._recorder.scale(x, factor)
