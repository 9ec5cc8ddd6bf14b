"""What a forward is written in: the operations of a layer, computed at once or noted for later.

A family writes its layers once, over values that are tensors (eager.py: prompts, and where nothing can be
recorded) or buffers of a program (recorded.py: decoding). Both run the same kernels and give the same bits.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from quant.kernels.interface import Weight
from quant.kernels.layers import DeltaRule, RoutingRule

Value = TypeVar("Value")


class BasicOperations(Protocol[Value]):
    """What every model needs. Values are `[rows, width]` float32, chosen experts int64."""

    def norm(self, x: Value, weight: torch.Tensor | None, eps: float) -> Value:
        """RMSNorm."""
        ...

    def linears(self, x: Value, *weights: Weight) -> list[Value]:
        """`x @ weight^T` for each weight."""
        ...

    def gated(self, gate: Value, up: Value, limit: float) -> Value:
        """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
        ...

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        ...

    def scale(self, x: Value, factor: float) -> Value:
        """x * factor."""
        ...

    def route(self, logits: Value, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Value, Value]:
        """The chosen experts, `[rows, top_k]`, and their weights: see `LayerOperations.route`."""
        ...


class Operations(BasicOperations[Value], Protocol[Value]):
    """And attention over appended keys and values, and what stands around it."""

    def norm_heads(self, x: Value, weight: torch.Tensor, eps: float) -> Value:
        """RMSNorm of each head by itself; weight `[head_dim]`."""
        ...

    def add_bias(self, x: Value, bias: torch.Tensor) -> Value:
        """x + bias `[width]`."""
        ...

    def clip(self, x: Value, limit: float) -> Value:
        """x cut to -limit .. limit."""
        ...

    def rotate(self, x: Value, heads: int) -> Value:
        """Heads turned by their rows' positions."""
        ...

    def attend(
        self,
        layer: int,
        q: Value,
        k: Value,
        v: Value | None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Value:
        """Keys and values appended to the layer's cache, then causal attention of the queries over it.

        v: None where the values are the first columns of the keys, as many as the cache says. Window and
        sinks as in `LayerOperations.attend`.
        """
        ...

    def convolve(self, layer: int, x: Value, weights: torch.Tensor) -> Value:
        """x after the layer's earlier rows, convolved: see `LayerOperations.convolve`."""
        ...

    def delta_rule(self, layer: int, x: Value, a: Value, b: Value, rule: DeltaRule) -> Value:
        """The layer's state, changed and asked token by token: see `LayerOperations.delta_rule`."""
        ...

    def gate(self, x: Value, gates: Value) -> Value:
        """Each of x's parts, of which there are as many as gates, times the sigmoid of its gate."""
        ...

    def choose(self, layer: int, queries: Value, weights: Value, keys: Value, top_k: int) -> Value:
        """Index keys appended to the layer's cache; the `top_k` tokens whose keys each row scores best,
        itself and those before it: `[rows, top_k]` int64, ascending, -1 behind.

        queries `[rows, heads * dim]`, weights `[rows, heads]`, keys `[rows, dim]`: see
        `LayerOperations.index_scores`.
        """
        ...

    def attend_chosen(self, layer: int, q: Value, k: Value, chosen: Value) -> Value:
        """Keys appended to the layer's cache, one for all heads, of which values are the first columns; then
        attention of the queries over the chosen tokens."""
        ...

    def part(self, x: Value, parts: int, first: int, width: int) -> Value:
        """Columns first .. first + width of each of x's parts (heads, say), side by side."""
        ...

    def join(self, x: Value, y: Value, parts: int) -> Value:
        """Each of x's parts, and beside it the same of y's."""
        ...

    def batched_linear(self, x: Value, weights: torch.Tensor) -> Value:
        """Plain weights `[n, rows, cols]`, each times its own part of x, side by side."""
        ...

    def at_layer(self, number: int | None) -> None:
        """What follows belongs to this layer, or to none."""
        ...

    def move(self, x: Value, device: torch.device) -> Value:
        """x on the device where it is used next."""
        ...
