"""The operations of a layer noted in a program, for one token each of several sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quant.formats.rows import Rows
from quant.kernels.cpu.cache_notes import KvPlace, Selector, StatePlace
from quant.kernels.cpu.program import Buffer
from quant.kernels.interface import Weight
from quant.kernels.layers import DeltaRule, RoutingRule
from quant.kernels.recording import StepRecorder


class RecordedBasics:
    """`BasicOperations` noted by a recorder: a row is a sequence's newest token, or a draft behind it."""

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

    def __init__(
        self,
        recorder: StepRecorder,
        frequencies: torch.Tensor,
        factor: float,
        places: Sequence[KvPlace | StatePlace],
        index_keys: Callable[[int], Rows],
    ) -> None:
        super().__init__(recorder)
        self._use(recorder, frequencies, factor)
        self._places = places
        self._index_keys = index_keys

    def _use(self, recorder: StepRecorder, frequencies: torch.Tensor, factor: float) -> None:
        """Note with this recorder from now on."""
        self._recorder = recorder
        turns = recorder.turns(frequencies)
        self._turns = turns if factor == 1 else recorder.scale(turns, factor)

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
        return x  # all is on one device
