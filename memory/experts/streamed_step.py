"""One layer of a prompt's chunk, whose experts stream past (streamed.py)."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

import torch

from memory.experts.slot_table import Key, SlotEntry, SlotTable
from memory.experts.streamed import StreamedPass
from memory.experts.streaming import GROUP, STARTING_S, carrying_s, split
from quant.kernels.interface import NO_EXTRAS, ExpertExtras, MoeCall


class StreamedStep:
    """One layer's experts in a pass: what `ExpertStep` is in any other step."""

    def __init__(self, passing: StreamedPass, layer: int, expert_ids: torch.Tensor) -> None:
        self._pass = passing
        self._slots = passing.slots
        self._layer = layer
        self._ids = expert_ids
        flat = expert_ids.flatten()
        self._order = flat.argsort(stable=True)  # rows by expert
        counts = torch.bincount(flat).tolist()
        self._uses = {expert: n for expert, n in enumerate(counts) if n}
        self._stops = dict(
            zip(self._uses, torch.tensor(list(self._uses.values())).cumsum(0).tolist(), strict=True)
        )
        self._on_gpus: list[list[int]] = [[] for _ in self._slots.gpus]  # held there for good
        self._by_cpu: list[int] = []
        self._sending: list[deque[Key]] = [deque() for _ in self._slots.gpus]
        self._divide()
        self._pass.go_on(self._sending)

    def __enter__(self) -> StreamedStep:
        return self

    def __exit__(self, *raised: object) -> None:
        """Unpin the step's experts, also if something failed; rings belong to the pass."""
        for expert in self._uses:
            self._slots.unpin((self._layer, expert))

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        swiglu_limit: float,
        extras: ExpertExtras = NO_EXTRAS,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs: x `[tokens, hidden]`, weights `[tokens, top_k]`."""
        tokens, top_k = self._ids.shape
        outputs = self._pass.outputs(tokens * top_k, x)
        inputs = {x.device: x}

        def compute(table: SlotTable, experts: list[int], entries: list[SlotEntry]) -> None:
            if table.tier.device not in inputs:
                inputs[table.tier.device] = x.to(table.tier.device)
            rows = torch.cat([self._rows(expert) for expert in experts])
            held = {e: table.weights(self._layer, entry) for e, entry in zip(experts, entries, strict=True)}
            call = MoeCall(inputs[table.tier.device], self._ids, weights, held, swiglu_limit, extras)
            self._pass.kernels.moe_some(call, rows, outputs)
            self._slots.telemetry.add("computed", table.tier.name, len(experts))

        for at, table in enumerate(self._slots.gpus):
            for first in range(0, len(self._on_gpus[at]), GROUP):
                experts = self._on_gpus[at][first : first + GROUP]
                compute(table, experts, [table.by_layer[self._layer][expert] for expert in experts])
        while self._by_cpu or any(self._sending) or any(map(self._sent_here, range(len(self._sending)))):
            self._pass.go_on(self._sending)
            is_idle = True
            for at, table in enumerate(self._slots.gpus):
                experts = self._arrived_on(at)
                if experts:
                    sent = self._pass.sent[at]
                    compute(table, experts, [sent[self._layer, expert].entry for expert in experts])
                    for expert in experts:
                        self._pass.leave(at, (self._layer, expert))
                    is_idle = False
            experts = self._arrived_in_dram()
            if experts:
                entries = [self._pass.source_of((self._layer, expert)) for expert in experts]
                compute(self._slots.dram, experts, [entry for entry in entries if entry is not None])
                for expert in experts:
                    self._by_cpu.remove(expert)
                    self._pass.done_with((self._layer, expert))
            elif is_idle:
                self._wait()
        return self._pass.kernels.weighted_sum(outputs.view(tokens, top_k, -1), weights)

    # ------------------------------------------------------------------------------------ who does what

    def _divide(self) -> None:
        """Decide where each expert is computed, and say what is needed."""
        slots, layer = self._slots, self._layer
        left: list[int] = []  # the least used first
        for expert in sorted(self._uses, key=lambda expert: self._uses[expert]):
            found = slots.find((layer, expert))
            slots.telemetry.add("hits", "nvme" if found is None else found[0].tier.name)
            slots.pin((layer, expert))  # guesses for later layers may not displace it
            if found is None or found[0] is slots.dram or not self._is_on_gpu(found[1]):
                left.append(expert)
            else:
                self._on_gpus[slots.gpus.index(found[0])].append(expert)
        self._pass.needs(layer, reversed(left))
        left = [expert for expert in left if not any((layer, expert) in sent for sent in self._pass.sent)]
        rooms = [at for at in range(len(slots.gpus)) if self._pass.room_on(at)]
        by_cpu = len(left)
        nbytes = slots.dram.layouts[layer].nbytes
        rates = [slots.gpus[at].tier.link_bytes_per_s or float("inf") for at in rooms]
        if rooms:
            costs = [
                max(
                    nbytes / slots.cpu_bytes_per_s,
                    self._uses[e] * self._pass.flops_per_token / self._pass.cpu_flops,
                )
                for e in left
            ]
            by_cpu = split(costs, nbytes / sum(rates))
            if any(not slots.gpus[at].tier.is_virtual for at in rooms):
                row = 4 * self._pass.hidden
                costs = [cost + self._uses[e] * row / min(rates) for cost, e in zip(costs, left, strict=True)]
                carrying = carrying_s(self._ids.numel(), len(self._ids), row, rates)
                held = sum(map(len, self._on_gpus))
                by_cpu = split(costs, nbytes / sum(rates), STARTING_S, held, carrying)
        self._by_cpu = left[:by_cpu]
        busy = dict.fromkeys(rooms, 0.0)
        # What DRAM holds goes first: the rest is read meanwhile.
        for expert in sorted(
            left[by_cpu:], key=lambda e: (self._pass.source_of((layer, e)) is None, -self._uses[e])
        ):
            at = min(rooms, key=lambda n: (busy[n], len(self._sending[n])))
            busy[at] += nbytes / rates[rooms.index(at)]
            self._sending[at].append((layer, expert))

    @staticmethod
    def _is_on_gpu(entry: SlotEntry) -> bool:
        """Whether an expert that is on its way to a GPU arrives there; else DRAM has it, or the disk."""
        with suppress(Exception):
            if entry.ticket is not None:
                entry.ticket.wait()
            return True
        return False

    def _rows(self, expert: int) -> torch.Tensor:
        """Those of the outputs that an expert gives, `[n]`."""
        stop = self._stops[expert]
        return self._order[stop - self._uses[expert] : stop]

    def _sent_here(self, at: int) -> bool:
        return any(key[0] == self._layer for key in self._pass.sent[at])

    def _arrived_on(self, at: int) -> list[int]:
        """The next group of experts that are in a GPU's ring; none before it is worth launching."""
        sent = {key[1]: held for key, held in self._pass.sent[at].items() if key[0] == self._layer}
        arrived = []
        for expert, held in list(sent.items()):
            ticket = held.entry.ticket
            if ticket is None or not ticket.is_done:
                continue
            if ticket.has_failed:  # DRAM still has it
                held.is_from_ring = False
                self._pass.leave(at, (self._layer, expert))
                self._by_cpu.append(expert)
            else:
                arrived.append(expert)
        is_rest = not self._sending[at] and len(arrived) == len(sent)
        is_full = len(arrived) >= min(GROUP, max(1, self._pass.room_on(at) // 2))
        return arrived[:GROUP] if is_rest or is_full else []

    def _arrived_in_dram(self) -> list[int]:
        arrived = []
        for expert in self._by_cpu:
            entry = self._pass.source_of((self._layer, expert))
            if entry is not None and (
                entry.ticket is None or (entry.ticket.is_done and not entry.ticket.has_failed)
            ):
                arrived.append(expert)
                if len(arrived) == GROUP:
                    break
        return arrived

    def _wait(self) -> None:
        """Wait for what comes next, so that something can be done."""
        for sent in self._pass.sent:
            for key, held in sent.items():
                if key[0] == self._layer and held.entry.is_moving and held.entry.ticket is not None:
                    with suppress(Exception):  # it is then computed by the processor
                        held.entry.ticket.wait()
                    return
        waiting = [
            *((self._layer, expert) for expert in self._by_cpu),
            *(key for queue in self._sending for key in queue),
        ]
        for key in waiting:
            source = self._pass.source_of(key)
            if source is not None and (
                source.is_moving or (source.ticket is not None and source.ticket.has_failed)
            ):
                self._pass.wait_for(key)
                return
        self._pass.make_room()
