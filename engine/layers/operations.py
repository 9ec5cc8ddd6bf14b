"""What a forward is written in: the operations of a layer, computed at once or noted for later.

A family writes its layers once, over values that are tensors (`Eager`: prompts, and where nothing can be
recorded) or buffers of a program (`Recorded`: decoding). Both run the same kernels and give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from engine.families.base import Segment
from engine.layers.rope import Rotation
from engine.layers.sparse_attention import choose_tokens
from quant.kernels.cpu.program import Buffer
from quant.kernels.cpu.recorder import KvPlace, Recorder, Selector, StatePlace
from quant.kernels.interface import Kernels, Weight
from quant.kernels.layers import DeltaRule, RoutingRule
from quant.kernels.recording import StepRecorder

Value = TypeVar("Value")

# Stores keys and values `[length, kv_heads * head_dim]` of a layer's segment, or keys alone where the values
# are columns of theirs; returns all that its slot then holds, `[kv_heads, end, .]` each.
Extend = Callable[[int, Segment, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
# Stores index keys `[length, dim]` of a layer's segment; returns all that its slot then holds, `[end, dim]`.
ExtendIndex = Callable[[int, Segment, torch.Tensor], torch.Tensor]


# Where the states of a layer lie that has these instead of keys and values.
States = Callable[[int], StatePlace]


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


class EagerBasics:
    """`BasicOperations` on tensors, computed at once."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return self._kernels.rms_norm(x, weight, eps)

    def linears(self, x: torch.Tensor, *weights: Weight) -> list[torch.Tensor]:
        return [self._kernels.linear(x, weight) for weight in weights]

    def gated(self, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
        return self._kernels.gated(gate, up, limit)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.route(logits, bias, rule)


class Eager(EagerBasics):
    """`Operations` on tensors, computed at once, for the tokens of some segments."""

    def __init__(
        self,
        kernels: Kernels,
        segments: Sequence[Segment],
        rotation: Rotation,
        extend: Extend,
        extend_index: ExtendIndex,
        states: States,
    ) -> None:
        super().__init__(kernels)
        self._segments = segments
        self._rotations = {rotation.turns.device: rotation}
        self._extend = extend
        self._extend_index = extend_index
        self._states = states

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._kernels.rms_norm(x.view(len(x), -1, len(weight)), weight, eps).view(x.shape)

    def add_bias(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x + bias

    def clip(self, x: torch.Tensor, limit: float) -> torch.Tensor:
        return x.clamp(-limit, limit)

    def rotate(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        if x.device not in self._rotations:
            self._rotations[x.device] = next(iter(self._rotations.values())).to(x.device)
        return self._rotations[x.device].apply(self._kernels, x.view(len(x), heads, -1)).view(x.shape)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        outs = []
        for segment, (of_q, of_k, *of_v) in self._by_segment(q, k, *(() if v is None else (v,))):
            keys, values = self._extend(layer, segment, of_k, of_v[0] if of_v else None)
            queries = of_q.view(segment.length, -1, keys.shape[-1])
            outs.append(self._kernels.attend(queries, keys, values, window, sinks).flatten(1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def convolve(self, layer: int, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outs = []
        for segment, (rows,) in self._by_segment(x):
            tail = self._states(layer).tails[segment.slot]
            outs.append(self._kernels.convolve(rows, weights, tail, segment.start))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def delta_rule(
        self, layer: int, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rule: DeltaRule
    ) -> torch.Tensor:
        outs = []
        for segment, (rows, of_a, of_b) in self._by_segment(x, a, b):
            state = self._states(layer).states[segment.slot]
            outs.append(self._kernels.delta_rule(rows, of_a, of_b, rule, state, is_first=segment.start == 0))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def gate(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        shares = self._kernels.sigmoid(gates).unsqueeze(-1)
        return (x.view(*gates.shape, -1) * shares).flatten(1)

    def choose(
        self, layer: int, queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        chosen = []
        stop = 0
        top_k = min(top_k, max(s.start + s.length for s in self._segments))
        for segment in self._segments:
            start, stop = stop, stop + segment.length
            held = self._extend_index(layer, segment, keys[start:stop])
            of_segment = queries[start:stop].view(segment.length, weights.shape[1], -1)
            chosen.append(choose_tokens(self._kernels, of_segment, weights[start:stop], held, top_k))
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def attend_chosen(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        outs = []
        stop = 0
        chosen = chosen.to(q.device)
        for segment in self._segments:
            start, stop = stop, stop + segment.length
            keys, values = self._extend(layer, segment, k[start:stop], None)
            queries = q[start:stop].view(segment.length, -1, keys.shape[-1])
            if keys.shape[1] <= chosen.shape[1]:  # all are
                attended = self._kernels.attend(queries, keys, values)
            else:
                rows = chosen[start:stop]
                attended = self._kernels.attend_chosen(queries, keys[0], rows, values.shape[-1])
            outs.append(attended.flatten(1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def part(self, x: torch.Tensor, parts: int, first: int, width: int) -> torch.Tensor:
        return x.view(len(x), parts, -1)[..., first : first + width].reshape(len(x), -1)

    def join(self, x: torch.Tensor, y: torch.Tensor, parts: int) -> torch.Tensor:
        return torch.cat([z.view(len(z), parts, -1) for z in (x, y)], dim=-1).flatten(1)

    def batched_linear(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._kernels.batched_linear(x.view(len(x), len(weights), -1), weights).flatten(1)

    def _by_segment(self, *values: torch.Tensor) -> Iterator[tuple[Segment, list[torch.Tensor]]]:
        stop = 0
        for segment in self._segments:
            start, stop = stop, stop + segment.length
            yield segment, [value[start:stop] for value in values]

    def at_layer(self, number: int | None) -> None:
        """Nothing is kept by layer."""

    def move(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x.to(device)


class RecordedBasics:
    """`BasicOperations` noted by a recorder: each row is the newest token of a sequence of its own."""

    def __init__(self, recorder: StepRecorder) -> None:
        self._recorder = recorder

    def norm(self, x: Buffer, weight: torch.Tensor | None, eps: float) -> Buffer:
        return self._recorder.norm(x, weight, eps)

    def linears(self, x: Buffer, *weights: Weight) -> list[Buffer]:
        return self._recorder.linears(x, weights)

    def gated(self, gate: Buffer, up: Buffer, limit: float) -> Buffer:
        return self._recorder.gated(gate, up, limit)

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        return self._recorder.add(x, y)

    def scale(self, x: Buffer, factor: float) -> Buffer:
        return self._recorder.scale(x, factor)

    def route(self, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Buffer, Buffer]:
        return self._recorder.route(logits, bias, rule)


class Recorded(RecordedBasics):
    """`Operations` noted by a recorder.

    frequencies  `[pairs]` float64, radians per position; factor: that what turns is multiplied by
    places       where each layer's keys and values, or its states, lie
    index_keys   where a layer's index keys lie, `[slots, capacity, dim]`
    """

    _recorder: Recorder

    def __init__(
        self,
        recorder: Recorder,
        frequencies: torch.Tensor,
        factor: float,
        places: Sequence[KvPlace | StatePlace],
        index_keys: Callable[[int], torch.Tensor],
    ) -> None:
        super().__init__(recorder)
        turns = recorder.turns(frequencies)
        self._turns = turns if factor == 1 else recorder.scale(turns, factor)
        self._places = places
        self._index_keys = index_keys

    def norm_heads(self, x: Buffer, weight: torch.Tensor, eps: float) -> Buffer:
        return self._recorder.norm(x, weight, eps)

    def add_bias(self, x: Buffer, bias: torch.Tensor) -> Buffer:
        return self._recorder.bias(x, bias)

    def clip(self, x: Buffer, limit: float) -> Buffer:
        return self._recorder.clip(x, limit)

    def rotate(self, x: Buffer, heads: int) -> Buffer:
        return self._recorder.rotate(x, self._turns, heads)

    def attend(
        self,
        layer: int,
        q: Buffer,
        k: Buffer,
        v: Buffer | None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Buffer:
        place = self._kv_place(layer)
        self._recorder.append(k, v, place)
        return self._recorder.attend(q, place, window, sinks)

    def convolve(self, layer: int, x: Buffer, weights: torch.Tensor) -> Buffer:
        return self._recorder.convolve(x, weights, self._state(layer))

    def delta_rule(self, layer: int, x: Buffer, a: Buffer, b: Buffer, rule: DeltaRule) -> Buffer:
        return self._recorder.delta_rule(x, a, b, rule, self._state(layer))

    def gate(self, x: Buffer, gates: Buffer) -> Buffer:
        return self._recorder.gate(x, gates)

    def choose(self, layer: int, queries: Buffer, weights: Buffer, keys: Buffer, top_k: int) -> Buffer:
        held = self._index_keys(layer)
        self._recorder.entry(keys, held, 1)
        selector = Selector(min(top_k, held.shape[1]), 1, 0)
        chosen, _ = self._recorder.select(queries, weights, held, 1, selector, None, makes_pool=False)
        return chosen

    def attend_chosen(self, layer: int, q: Buffer, k: Buffer, chosen: Buffer) -> Buffer:
        place = self._kv_place(layer)
        self._recorder.append(k, None, place)
        return self._recorder.attend(q, place, chosen=chosen)

    def part(self, x: Buffer, parts: int, first: int, width: int) -> Buffer:
        return self._recorder.part(x, parts, first, width)

    def join(self, x: Buffer, y: Buffer, parts: int) -> Buffer:
        return self._recorder.join(x, y, parts)

    def batched_linear(self, x: Buffer, weights: torch.Tensor) -> Buffer:
        return self._recorder.batched_linear(x, weights)

    def _kv_place(self, layer: int) -> KvPlace:
        place = self._places[layer]
        assert isinstance(place, KvPlace)
        return place

    def _state(self, layer: int) -> StatePlace:
        place = self._places[layer]
        assert isinstance(place, StatePlace)
        return place

    def at_layer(self, number: int | None) -> None:
        self._recorder.layer = number

    def move(self, x: Buffer, device: torch.device) -> Buffer:
        return x  # all is in host memory
