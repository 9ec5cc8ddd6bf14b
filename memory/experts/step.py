"""One layer's experts for one batch: what is there is computed while what is missing arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memory.experts.slot_table import Key, Place, Shelf
from memory.transfer import Priority
from quant.errors import BudgetError
from quant.kernels.interface import ExpertWeights

if TYPE_CHECKING:
    from memory.experts.store import ExpertStore


@dataclass(frozen=True)
class _Taken:
    """An expert that this wave computes, where it is or will be, and whether it was missing."""

    expert: int
    shelf: Shelf
    place: Place
    was_missing: bool = False


@dataclass(frozen=True)
class _Part:
    """Experts of one tier, and the tokens that chose them.

    rows    of the step's outputs that they give, `[n]`; None where it is all of them
    ids     the expert of each, `[n, 1]`
    inputs  the token of each, `[n, hidden]`, where the experts lie
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

    def __init__(self, store: ExpertStore, layer: int, expert_ids: torch.Tensor, needed: list[int]) -> None:
        self._store = store
        self._layer = layer
        self._ids = expert_ids
        self._needed = len(needed)
        self._later = needed
        self._now: list[_Taken] = []
        for expert in needed:
            found = store.find((layer, expert))
            store.telemetry.add("hits", "nvme" if found is None else found[0].tier.name)
        self._begin()

    def __enter__(self) -> ExpertStep:
        return self

    def __exit__(self, *raised: object) -> None:
        """What the step uses may leave again, also where something went wrong before or in `run`."""
        self._release()

    def run(self, x: torch.Tensor, weights: torch.Tensor, swiglu_limit: float) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs: x `[tokens, hidden]`, weights `[tokens, top_k]`.

        On the device of x, wherever the experts are computed.
        """
        tokens, top_k = self._ids.shape
        outputs = x.new_empty(tokens * top_k, x.shape[1])
        try:
            while self._now:
                self._compute_wave(x, outputs, swiglu_limit)
                self._release()
                self._begin()
        finally:
            self._release()
        return self._store.kernels.weighted_sum(outputs.view(tokens, top_k, -1), weights)

    def _key(self, expert: int) -> Key:
        return self._layer, expert

    def _begin(self) -> None:
        """Take as many of the remaining experts as slots can be found for; start what must move."""
        store = self._store
        store.settle()
        missing: list[int] = []
        waiting: list[int] = []
        in_dram: list[int] = []
        for expert in self._later:  # what is here already must not make room for what is not
            found = store.find(self._key(expert))
            if found is None:
                missing.append(expert)
                continue
            shelf, place = found
            self._take(expert, shelf, place)
            if place.foreseen:
                place.foreseen = False
                store.telemetry.add("prefetches", "used")
            if place.is_moving:
                store.hurry(place)
            elif shelf is store.dram:
                in_dram.append(expert)
        for expert in missing:
            if store.dram.arena.free > 0 or store.make_room(self._layer):
                store.read(self._key(expert), Priority.DEMAND)
                place = store.dram.by_layer[self._layer][expert]
                self._take(expert, store.dram, place, was_missing=True)
            else:
                waiting.append(expert)
        self._later = waiting
        if waiting and not self._now:
            if not store.wait_for_room(self._layer):
                raise BudgetError("no DRAM slot can be freed for an expert; raise the DRAM budget")
            self._begin()
            return
        self._fetch_some(in_dram)
        store.note_slots()

    def _take(self, expert: int, shelf: Shelf, place: Place, *, was_missing: bool = False) -> None:
        self._store.busy.add(self._key(expert))
        self._now.append(_Taken(expert, shelf, place, was_missing))

    def _fetch_some(self, in_dram: list[int]) -> None:
        """Move the most valuable of the experts in DRAM to GPUs, as many as the cost model says."""
        store = self._store
        if not store.gpus or not in_dram:
            return
        ranked = sorted(in_dram, key=lambda e: -store.worth(self._key(e)))
        speed = sum(shelf.tier.link_bytes_per_s or float("inf") for shelf in store.gpus)
        if not store.keeps_copies:
            speed /= 2  # another expert comes back
        for expert in ranked[: fetch_count(len(ranked), speed, store.cpu_bytes_per_s)]:
            store.move_to_gpu(self._key(expert))
        for at, taken in enumerate(self._now):
            if taken.expert in in_dram and (found := store.find(self._key(taken.expert))) is not None:
                self._now[at] = _Taken(taken.expert, *found)

    def _compute_wave(self, x: torch.Tensor, outputs: torch.Tensor, swiglu_limit: float) -> None:
        """Compute what is here, again and again, until everything has arrived."""
        left = self._now
        while left:
            here = [taken for taken in left if not taken.place.is_moving]
            if not here:
                left[0] = self._wait(left[0])
                continue
            left = [taken for taken in left if not any(taken is other for other in here)]
            here = [self._wait(taken) for taken in here]  # raises where the bytes did not come
            # The host's tokens are fetched first: behind what GPUs compute they would wait for it.
            parts = [
                self._part(shelf, [taken for taken in here if taken.shelf is shelf], x)
                for shelf in (self._store.dram, *self._store.gpus)
                if any(taken.shelf is shelf for taken in here)
            ]
            found = [
                self._compute(part, swiglu_limit) for part in reversed(parts)
            ]  # the CPU's last: it waits
            for rows, y in found:
                if rows is None:
                    outputs.copy_(y)
                else:
                    outputs[rows.to(outputs.device)] = y.to(outputs.device)

    def _wait(self, taken: _Taken) -> _Taken:
        """Wait for an expert's bytes, and say where they are: elsewhere where they did not come.

        A read that an earlier step or a guess began may fail once, and so may the way to a GPU.
        """
        ticket = taken.place.ticket
        if ticket is None:
            return taken
        try:
            ticket.wait()
        except Exception:
            if taken.was_missing:
                raise
            if taken.shelf is not self._store.dram:
                return self._without_gpu(taken.expert)
            self._store.read_into(self._key(taken.expert), taken.place, Priority.DEMAND).wait()
        return taken

    def _without_gpu(self, expert: int) -> _Taken:
        """An expert that did not reach its GPU, in DRAM: where it still is, or read anew."""
        store, key = self._store, self._key(expert)
        found = store.find(key)
        if found is None:
            if not store.make_room(self._layer) and not store.wait_for_room(self._layer):
                raise BudgetError("no DRAM slot can be freed for an expert; raise the DRAM budget")
            store.read(key, Priority.DEMAND)
            found = store.dram, store.dram.by_layer[self._layer][expert]
        shelf, place = found
        if place.ticket is not None:
            place.ticket.wait()
        return _Taken(expert, shelf, place, was_missing=True)

    def _part(self, shelf: Shelf, experts: list[_Taken], x: torch.Tensor) -> _Part:
        """What the experts of one tier are to compute, where they lie."""
        weights = {t.expert: shelf.weights(t.place) for t in experts}
        flat, top_k = self._ids.flatten(), self._ids.shape[1]
        if len(weights) == self._needed:
            inputs = x.repeat_interleave(top_k, dim=0).to(shelf.tier.device)
            return _Part(shelf.tier.name, weights, None, flat.unsqueeze(1), inputs)
        rows = torch.isin(flat, torch.tensor(list(weights))).nonzero().squeeze(1)
        inputs = x[(rows // top_k).to(x.device)].to(shelf.tier.device)
        return _Part(shelf.tier.name, weights, rows, flat[rows].unsqueeze(1), inputs)

    def _compute(self, part: _Part, swiglu_limit: float) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Start the experts of a part: the rows of the step's outputs that they give, and these."""
        ones = torch.ones(len(part.ids), 1, device=part.inputs.device)
        outputs = self._store.kernels.moe(part.inputs, part.ids, ones, part.weights, swiglu_limit)
        self._store.telemetry.add("computed", part.tier, len(part.weights))
        return part.rows, outputs

    def _release(self) -> None:
        """These experts may leave again."""
        self._store.busy.difference_update(self._key(taken.expert) for taken in self._now)
        self._now = []


def fetch_count(missing: int, link_bytes_per_s: float, cpu_bytes_per_s: float) -> int:
    """How many of `missing` experts in DRAM to move to GPUs so that links and CPU finish together."""
    if link_bytes_per_s == float("inf"):
        return missing
    return round(missing * link_bytes_per_s / (link_bytes_per_s + cpu_bytes_per_s))
