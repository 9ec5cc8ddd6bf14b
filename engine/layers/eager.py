"""The operations of a layer computed at once, for the tokens of several sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from engine.families.base import Segment
from engine.layers.rope import Rotation
from engine.layers.sparse_attention import choose_tokens
from quant.formats.rows import Rows
from quant.kernels.cpu.cache_notes import StatePlace
from quant.kernels.interface import Kernels, Weight
from quant.kernels.layers import DeltaRule, RoutingRule

# Stores keys and values `[length, kv_heads * head_dim]` of a layer's segment, or keys alone where the values
# are columns of theirs; returns all that its slot then holds, `[kv_heads, end, .]` each.
Extend = Callable[[int, Segment, torch.Tensor, torch.Tensor | None], tuple[Rows, Rows]]
# Stores index keys `[length, dim]` of a layer's segment; returns all that its slot then holds, `[end, dim]`.
ExtendIndex = Callable[[int, Segment, torch.Tensor], Rows]
# Where the states of a layer lie that has these instead of keys and values.
States = Callable[[int], StatePlace]


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
        return _joined(outs)

    def convolve(self, layer: int, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outs = []
        for segment, (rows,) in self._by_segment(x):
            tail = self._states(layer).tails[segment.slot]
            outs.append(self._kernels.convolve(rows, weights, tail, segment.start))
        return _joined(outs)

    def delta_rule(
        self, layer: int, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rule: DeltaRule
    ) -> torch.Tensor:
        outs = []
        for segment, (rows, of_a, of_b) in self._by_segment(x, a, b):
            state = self._states(layer).states[segment.slot]
            outs.append(self._kernels.delta_rule(rows, of_a, of_b, rule, state, is_first=segment.start == 0))
        return _joined(outs)

    def gate(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        shares = self._kernels.sigmoid(gates).unsqueeze(-1)
        return (x.view(*gates.shape, -1) * shares).flatten(1)

    def choose(
        self, layer: int, queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        chosen = []
        top_k = min(top_k, max(s.start + s.length for s in self._segments))
        for segment, (rows, of_rows, of_keys) in self._by_segment(queries, weights, keys):
            held = self._extend_index(layer, segment, of_keys)
            of_heads = rows.view(segment.length, weights.shape[1], -1)
            chosen.append(choose_tokens(self._kernels, of_heads, of_rows, held, top_k))
        return _joined(chosen)

    def attend_chosen(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        outs = []
        chosen = chosen.to(q.device)
        for segment, (of_q, of_k, rows) in self._by_segment(q, k, chosen):
            keys, values = self._extend(layer, segment, of_k, None)
            queries = of_q.view(segment.length, -1, keys.shape[-1])
            if keys.shape[1] <= chosen.shape[1]:  # all are
                attended = self._kernels.attend(queries, keys, values)
            else:
                attended = self._kernels.attend_chosen(queries, keys[0], rows, values.shape[-1])
            outs.append(attended.flatten(1))
        return _joined(outs)

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


def _joined(outs: list[torch.Tensor]) -> torch.Tensor:
    """The rows of all segments; a single one's are not copied."""
    return outs[0] if len(outs) == 1 else torch.cat(outs)
