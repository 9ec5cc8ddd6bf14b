"""One layer's experts for one batch: resident ones are computed while missing ones arrive."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memory.experts.slot_table import SlotTable
from memory.experts.slots import Claimed, ExpertSlots
from quant.kernels.interface import NO_EXTRAS, ExpertExtras, ExpertWeights, Kernels, MoeCall


@dataclass(frozen=True)
class _Part:
    """Experts of one tier, and the tokens that chose them.

    rows    of the step's outputs that they give, `[n]`; None where it is all of them
    ids     the expert of each, `[n, 1]`; or all that the step's tokens chose, `[tokens, top_k]`
    inputs  the token of each row of ids, `[., hidden]`, on the experts' device
    """

    tier: str
    weights: dict[int, ExpertWeights]
    rows: torch.Tensor | None
    ids: torch.Tensor
    inputs: torch.Tensor


class ExpertStep:
    """One layer's experts for one batch, between `ExpertStore.acquire` and the sum of their outputs.

    With fewer slots than the step needs experts, they are computed in waves.
    """

    def __init__(
        self, slots: ExpertSlots, kernels: Kernels, layer: int, expert_ids: torch.Tensor, needed: list[int]
    ) -> None:
        self._slots = slots
        self._kernels = kernels
        self._layer = layer
        self._ids = expert_ids
        self._needed = len(needed)
        for expert in needed:
            found = slots.find((layer, expert))
            slots.telemetry.add("hits", "nvme" if found is None else found[0].tier.name)
        self._claimed, self._waiting = slots.claim(layer, needed)

    def __enter__(self) -> ExpertStep:
        return self

    def __exit__(self, *raised: object) -> None:
        """Unpin the step's experts, also if something failed before or in `run`."""
        self._release()

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        swiglu_limit: float,
        extras: ExpertExtras = NO_EXTRAS,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs: x `[tokens, hidden]`, weights `[tokens, top_k]`.

        The result is on the device of x, wherever the experts are computed.
        """
        tokens, top_k = self._ids.shape
        outputs = x.new_empty(tokens * top_k, x.shape[1])
        try:
            while self._claimed:
                outputs = self._compute_wave(x, outputs, swiglu_limit, extras)
                self._release()
                if self._waiting:
                    self._claimed, self._waiting = self._slots.claim(self._layer, self._waiting)
        finally:
            self._release()
        return self._kernels.weighted_sum(outputs.view(tokens, top_k, -1), weights)

    def _compute_wave(
        self, x: torch.Tensor, outputs: torch.Tensor, swiglu_limit: float, extras: ExpertExtras
    ) -> torch.Tensor:
        """Compute whatever has arrived, repeatedly, until everything is done; all outputs so far."""
        left = self._claimed
        while left:
            here = [held for held in left if not held.entry.is_moving]
            if not here:
                left = [self._slots.arrive(self._layer, left[0]), *left[1:]]
                continue
            arrived = set(map(id, here))
            left = [held for held in left if id(held) not in arrived]
            here = [self._slots.arrive(self._layer, held) for held in here]  # raises if a transfer failed
            # Fetch the host's tokens first, or the copy would queue behind the GPU's kernels.
            parts = [
                self._part(table, [held for held in here if held.table is table], x)
                for table in reversed(self._slots.tables)
                if any(held.table is table for held in here)
            ]
            found = [
                self._compute(part, swiglu_limit, extras) for part in reversed(parts)
            ]  # the CPU's part last: it blocks
            for rows, y in found:
                if rows is None:
                    outputs = y.to(outputs.device)
                else:
                    outputs[rows.to(outputs.device)] = y.to(outputs.device)
        return outputs

    def _part(self, table: SlotTable, experts: list[Claimed], x: torch.Tensor) -> _Part:
        """The work for the experts of one tier, on its device."""
        weights = {held.expert: table.weights(self._layer, held.entry) for held in experts}
        flat, top_k = self._ids.flatten(), self._ids.shape[1]
        if len(weights) == self._needed:
            return _Part(table.tier.name, weights, None, self._ids, x.to(table.tier.device))
        rows = torch.isin(flat, torch.tensor(list(weights))).nonzero().squeeze(1)
        inputs = x[(rows // top_k).to(x.device)].to(table.tier.device)
        return _Part(table.tier.name, weights, rows, flat[rows].unsqueeze(1), inputs)

    def _compute(
        self, part: _Part, swiglu_limit: float, extras: ExpertExtras
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Launch the experts of a part; returns the rows of the step's outputs they produce, and the
        outputs."""
        ones = torch.ones(part.ids.shape, device=part.inputs.device)
        call = MoeCall(part.inputs, part.ids, ones, part.weights, swiglu_limit, extras)
        outputs = self._kernels.moe_apart(call).flatten(0, 1)
        self._slots.telemetry.add("computed", part.tier, len(part.weights))
        return part.rows, outputs

    def _release(self) -> None:
        """Unpin these experts."""
        self._slots.release(self._layer, self._claimed)
        self._claimed = []
