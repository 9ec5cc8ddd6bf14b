"""A decoder's operations noted for several devices: one program for each stay on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.families.base import Batch
from engine.families.on_gpus.step import OnGpus, RecorderOn, StepExperts, StepOnGpus
from engine.layers.recorded import Recorded
from quant.formats.rows import Rows
from quant.kernels.cpu.cache_notes import KvPlace, StatePlace
from quant.kernels.cpu.program import Buffer
from quant.kernels.interface import NO_EXTRAS, ExpertExtras
from quant.kernels.layers import RoutingRule


class DecoderOnGpus(OnGpus, Recorded):
    """`Operations` noted by a recorder for each device; `routed` are its experts.

    turning  frequencies and factor, and places and index_keys: see `Recorded`
    devices  of the layers that have routed experts
    """

    def __init__(
        self,
        recorder_on: RecorderOn,
        first: torch.device,
        turning: tuple[torch.Tensor, float],
        places: Sequence[KvPlace | StatePlace],
        index_keys: Callable[[int], Rows],
        experts: StepExperts | None,
        devices: list[torch.device],
    ) -> None:
        self.step = StepOnGpus(recorder_on, first, experts)
        self._turning = turning
        super().__init__(self.step.recorder, *turning, places, index_keys)
        self.routed = None if experts is None else ExpertsOnGpus(self, experts, devices)

    def move(self, x: Buffer, device: torch.device) -> Buffer:
        if device == self.step.device:
            return x
        (moved,) = self.step.go_to(device, [x])
        self._use(self.step.recorder, *self._turning)
        return moved

    def route(self, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Buffer, Buffer]:
        layer = None if self.routed is None else self.routed.routing
        if layer is None:
            return super().route(logits, bias, rule)
        return self.step.route(layer, logits, bias, rule)

    def run(self, batch: Batch, embedded: torch.Tensor) -> torch.Tensor:
        """Logits of `batch.logit_rows`, of the tokens' embedding `[rows, hidden]`."""
        return self.step.run(embedded, *batch.places())[batch.logit_rows]


class ExpertsOnGpus:
    """`RoutedExperts` of such a step.

    routing  the layer whose router is noted; None while it is a later layer's, for a prediction
    """

    def __init__(self, ops: DecoderOnGpus, experts: StepExperts, devices: list[torch.device]) -> None:
        self._step = ops.step
        self._store = experts.store
        self._devices = devices
        self._begun: int | None = None  # the layer whose experts are noted next
        self._next = 0

    @property
    def routing(self) -> int | None:
        return self._next if self._begun is None else None

    def wants_guesses(self, layer: int) -> bool:
        """Of the layer after the one that is noted, where experts are on disk and its router is here."""
        is_next = self._begun is not None and layer == self._begun + 1
        return is_next and not self._store.slots.keeps_copies and self._devices[layer] == self._step.device

    def prefetch(self, layer: int, ids: Buffer) -> None:
        self._step.guess(layer, ids)

    def acquire(self, layer: int, ids: Buffer) -> None:
        self._begun = layer
        self._step.acquire(layer, ids)

    def run(
        self, layer: int, x: Buffer, ids: Buffer, weights: Buffer, extras: ExpertExtras = NO_EXTRAS
    ) -> Buffer:
        self._begun, self._next = None, layer + 1
        return self._step.run_experts(layer, x, ids, weights, extras)
