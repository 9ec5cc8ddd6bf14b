"""One back end for a machine with GPUs: dispatches each weight to the kernels of its device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch

from quant.errors import ConfigError
from quant.formats.rows import RowFormat, Rows
from quant.kernels.interface import ExpertFormats, Kernels, MoeCall, Products, SlotLayout, Weight
from quant.kernels.layers import DeltaRule, RoutingRule
from quant.packed import Format, PackedTensor


class DeviceKernels:
    """`Kernels` that computes on the weights' device; activations must be there too.

    host   for weights in host memory, and for operations without weights there
    gpus  one back end for each GPU
    """

    name = "gpus"

    def __init__(self, host: Kernels, gpus: Mapping[torch.device, Kernels]) -> None:
        self._host = host
        self._gpus = dict(gpus)

    def describe(self) -> str:
        return "; ".join(kernels.describe() for kernels in (self._host, *self._gpus.values()))

    def on(self, device: torch.device) -> Kernels:
        return self._gpus.get(device, self._host)

    @contextmanager
    def multiplying(self, products: Products) -> Iterator[None]:
        with ExitStack() as stack:
            for kernels in self._gpus.values():
                stack.enter_context(kernels.multiplying(products))
            with suppress(ConfigError):  # a processor without such kernels stays exact
                stack.enter_context(self._host.multiplying(products))
            yield

    def prepare(self, weight: Weight) -> Weight:
        return self._host.prepare(weight)

    def slot_layout(self, hidden: int, width: int, formats: Format | ExpertFormats) -> SlotLayout:
        return self._host.slot_layout(hidden, width, formats)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        return self.on(_device_of(weight)).linear(x, weight)

    def linear_blocks(self, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        return self.on(_device_of(weights[0])).linear_blocks(x, weights)

    def batched_linear(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.on(weights.device).batched_linear(x, weights)

    def moe(self, call: MoeCall) -> torch.Tensor:
        return self.on(call.x.device).moe(call)

    def moe_apart(self, call: MoeCall) -> torch.Tensor:
        return self.on(call.x.device).moe_apart(call)

    def moe_some(self, call: MoeCall, some: torch.Tensor, out: torch.Tensor) -> None:
        self.on(call.x.device).moe_some(call, some, out)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return self.on(x.device).rms_norm(x, weight, eps)

    def sinkhorn(self, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        return self.on(logits.device).sinkhorn(logits, iterations, eps)

    def gather_rows(self, table: PackedTensor, rows: torch.Tensor) -> torch.Tensor:
        return self.on(_device_of(table)).gather_rows(table, rows)

    def gated(
        self, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, shift: float = 0.0
    ) -> torch.Tensor:
        return self.on(gate.device).gated(gate, up, limit, alpha, shift)

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        return self.on(x.device).sigmoid(x)

    def weighted_sum(self, parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.on(parts.device).weighted_sum(parts, weights)

    def mix_streams(
        self, streams: torch.Tensor, y: torch.Tensor, post: torch.Tensor, combine: torch.Tensor
    ) -> torch.Tensor:
        return self.on(streams.device).mix_streams(streams, y, post, combine)

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        return self.on(positions.device).turns(positions, frequencies)

    def rotate(self, x: torch.Tensor, turns: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        return self.on(x.device).rotate(x, turns, in_place=in_place)

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.on(logits.device).route(logits, bias, rule)

    def weigh(self, logits: torch.Tensor, chosen: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
        return self.on(logits.device).weigh(logits, chosen, rule)

    def pool_groups(self, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return self.on(rows.device).pool_groups(rows, gates)

    def engram_gates(
        self, streams: torch.Tensor, qk: torch.Tensor, keys: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self.on(streams.device).engram_gates(streams, qk, keys, eps)

    def encode_rows(self, x: torch.Tensor, form: RowFormat | None) -> Rows:
        return self.on(x.device).encode_rows(x, form)

    def index_scores(
        self,
        queries: torch.Tensor,
        weights: torch.Tensor,
        keys: Rows,
        visible: torch.Tensor,
        entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.on(queries.device).index_scores(queries, weights, keys, visible, entries)

    def best_columns(self, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        return self.on(scores.device).best_columns(scores, top_k)

    def convolve(
        self, x: torch.Tensor, weights: torch.Tensor, tail: torch.Tensor, before: int
    ) -> torch.Tensor:
        return self.on(x.device).convolve(x, weights, tail, before)

    def delta_rule(
        self,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        rule: DeltaRule,
        state: torch.Tensor,
        *,
        is_first: bool,
    ) -> torch.Tensor:
        return self.on(x.device).delta_rule(x, a, b, rule, state, is_first=is_first)

    def attend(
        self,
        q: torch.Tensor,
        keys: Rows,
        values: Rows,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.on(q.device).attend(q, keys, values, window, sinks)

    def attend_chosen(
        self, q: torch.Tensor, rows: Rows, chosen: torch.Tensor, value_dim: int
    ) -> torch.Tensor:
        return self.on(q.device).attend_chosen(q, rows, chosen, value_dim)

    def attend_sparse(
        self,
        q: torch.Tensor,
        window_kv: Rows,
        sink: torch.Tensor,
        window: int,
        compressed: Rows | None = None,
        entries: torch.Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        return self.on(q.device).attend_sparse(
            q, window_kv, sink, window, compressed, entries, in_place=in_place
        )


def _device_of(weight: Weight) -> torch.device:
    return weight.device if isinstance(weight, torch.Tensor) else weight.codes.device
