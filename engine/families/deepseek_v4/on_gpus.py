"""V4's operations noted for several devices: one program for each stay on a device, run one after the other.

A layer has all of its state on its own device, so only the streams travel. Experts that the tokens' ids
choose are looked up by the host, which knows the tokens before the step begins: the programs have them as
inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.grouped import GroupedCache
from engine.families.base import Batch
from engine.families.deepseek_v4.notes import V4Notes
from engine.families.deepseek_v4.operations import V4Parts
from engine.families.on_gpus.stays import Stay
from engine.families.on_gpus.step import OnGpus, RecorderOn, StepExperts, StepOnGpus
from memory.experts.coordinator import Coordinator
from quant.kernels.cpu.program import Buffer
from quant.kernels.layers import RoutingRule


class V4OnGpus(OnGpus, V4Notes):
    """`V4Operations` noted by a recorder for each device, for steps with `cache`."""

    def __init__(
        self,
        parts: V4Parts,
        recorder_on: RecorderOn,
        cache: GroupedCache,
        first: torch.device,
        coordinator: Coordinator,
    ) -> None:
        c = parts.config
        experts = StepExperts(
            parts.weights.experts, coordinator, c.swiglu_limit, c.layers, c.n_routed_experts
        )
        self.step = StepOnGpus(recorder_on, first, experts)
        super().__init__(parts, self.step.recorder, cache)
        self._weights = parts.weights
        self._layer: int | None = None
        self._by_token: dict[tuple[int, int], Buffer] = {}  # by layer and the id of the stay that has it
        self._chosen: list[tuple[Stay, Buffer, torch.Tensor]] = []  # what a step's tokens say to inputs

    # ------------------------------------------------------------------------------------------- running

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[n, vocab_size]`."""
        ids = batch.token_ids
        for stay, buffer, table in self._chosen:
            assert stay.program is not None
            stay.rows(buffer, len(ids)).copy_(table[ids])
        return self.step.run(self._embed[ids].float(), *batch.places())[batch.logit_rows]

    # ----------------------------------------------------------------------------------------- recording

    def at_layer(self, number: int | None) -> None:
        self._layer = number
        super().at_layer(number)

    def move(self, device: torch.device, *values: Buffer) -> Sequence[Buffer]:
        if device == self._recorder.device:
            return values
        moved = self.step.go_to(device, values)
        self._recorder = self.step.recorder
        self._turns = {}
        return moved

    def by_token(self, number: int, table: torch.Tensor) -> Buffer:
        key = number, id(self.step.stay)
        if key not in self._by_token:
            ids = self._recorder.input(table.shape[1], torch.int64)
            self._by_token[key] = ids
            self._chosen.append((self.step.stay, ids, table))
        return self._by_token[key]

    def route(self, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Buffer, Buffer]:
        assert self._layer is not None
        return self.step.route(self._layer, logits, bias, rule)

    def weigh(self, logits: Buffer, ids: Buffer, rule: RoutingRule) -> Buffer:
        assert self._layer is not None
        return self.step.weigh(self._layer, logits, ids, rule)

    def wants_guesses(self, number: int) -> bool:
        """Where the next layer is on this device, and its experts may have to be read."""
        if self._layer is None or number == self._layer or self._weights.experts.slots.keeps_copies:
            return False
        return self._weights.layers[number].device == self._recorder.device

    def prefetch(self, number: int, ids: Buffer) -> None:
        self.step.guess(number, ids)

    def acquire(self, number: int, ids: Buffer) -> None:
        self.step.acquire(number, ids)

    def experts(self, number: int, x: Buffer, ids: Buffer, weights: Buffer) -> Buffer:
        return self.step.run_experts(number, x, ids, weights)
