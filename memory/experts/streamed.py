"""A prompt's chunk passing through the layers: nearly every expert of each is needed, so they stream past.

Where a GPU holds an expert, it is computed there. The others go to the GPUs over all links at once, those
with the most tokens first, while the processor computes those with the fewest; what DRAM does not hold is
read from disk in the same order, layer after layer, ahead of need. All this passes through rings of slots
that are borrowed for the pass and given back after it, so a prompt displaces nothing else that decoding uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from memory.experts.slot_table import Key, SlotEntry, SlotTable
from memory.experts.slots import ExpertSlots
from memory.transfer import Ticket
from quant.kernels.interface import NO_EXTRAS, ExpertExtras, Kernels, MoeCall

# Uses of a layer's expert, on average, from which on nearly all of them are used.
MANY_USES = 4
# Slots of a ring at most, and the share of a tier's slots that it may take.
RING_SLOTS = 64
RING_SHARE = 4
# Experts that are computed together: enough for few launches, few enough to start early.
GROUP = 8
# What starting an expert's share of a group's operations on a GPU takes, one by one from Python.
STARTING_S = 32e-6


def is_streamed(tokens: int, top_k: int, experts: int) -> bool:
    """Whether so many tokens use nearly all of a layer's experts."""
    return tokens * top_k >= MANY_USES * experts


def ring_slots(slots: int) -> int:
    """How many slots of a tier a pass borrows."""
    return min(RING_SLOTS, slots // RING_SHARE)


def carrying_s(uses: float, tokens: int, row_bytes: int, rates: Sequence[float]) -> float:
    """Seconds for which a layer's inputs on their way to other GPUs, or outputs on their way back, keep a
    link busy, if GPUs share the experts evenly; rates in bytes a second."""
    if len(rates) < 2:
        return 0.0
    return max(float(tokens), uses * (1 - 1 / len(rates))) * row_bytes / min(rates)


def split(
    costs: Sequence[float],
    sending_s: float,
    starting_s: float = 0.0,
    held: int = 0,
    carrying: float = 0.0,
) -> int:
    """How many of some experts, the cheapest ones first, the processor computes while the others are sent, so
    that both finish together: costs in seconds, `sending_s` for each. `starting_s` for each on GPUs, which
    hold `held` others; links carry other things for `carrying` seconds."""

    def others(count: int) -> float:
        return max(count * sending_s + carrying, (count + held) * starting_s)

    computing = 0.0
    for number, cost in enumerate(costs):
        computing += cost
        if computing > others(len(costs) - number - 1):
            before = max(computing - cost, others(len(costs) - number))
            return number + 1 if computing < before else number
    return len(costs)


@dataclass
class _Sent:
    """An expert in a GPU's ring, on its way or there; `source` until it has left its slot in DRAM's."""

    entry: SlotEntry
    source: SlotEntry
    is_from_ring: bool


class StreamedPass:
    """The rings, and what passes through them. Used by one thread, the engine's.

    layers      that the pass computes with many tokens, in order
    rankings    of each layer's experts, the likeliest first
    cpu_flops   at which the processor computes many tokens
    """

    def __init__(
        self,
        slots: ExpertSlots,
        kernels: Kernels,
        layers: Sequence[int],
        rankings: Sequence[Sequence[int]],
        hidden: int,
        flops_per_token: float,
        cpu_flops: float,
    ) -> None:
        self.slots = slots
        self.kernels = kernels
        self.layers = frozenset(layers)
        self.hidden = hidden
        self.flops_per_token = flops_per_token
        self.cpu_flops = cpu_flops
        self._to_read = deque((n, e) for n, rank in zip(layers, rankings, strict=True) for e in rank)
        self._to_send = deque(self._to_read if slots.gpus else ())
        self._read: dict[Key, SlotEntry] = {}  # into DRAM's ring, and not done with yet
        self._ahead: set[Key] = set()  # of these, those that nobody waited for when they were asked for
        self.sent: list[dict[Key, _Sent]] = [{} for _ in slots.gpus]
        self._current = -1  # the layer whose needs are known
        self._ring: list[int] = []
        if not slots.keeps_copies:
            self._ring = slots.borrow(slots.dram, max(2, ring_slots(slots.dram.arena.slots)))
        self._gpu_rings = [slots.borrow(gpu, ring_slots(gpu.arena.slots)) for gpu in slots.gpus]
        self._sizes = [len(ring) for ring in self._gpu_rings]
        self._freed_later: list[tuple[Ticket, list[int], int]] = []
        self.go_on()

    def close(self) -> None:
        """Give back everything, once what is on its way has ended."""
        for key in list(self._read):
            self.done_with(key)
        for at, sent in enumerate(self.sent):
            for key in list(sent):
                self.leave(at, key)
        for ticket, ring, slot in self._freed_later:
            with suppress(Exception):  # nobody wants these bytes any more
                ticket.wait()
            ring.append(slot)
        self.slots.give_back(self.slots.dram, self._ring)
        for gpu, ring in zip(self.slots.gpus, self._gpu_rings, strict=True):
            self.slots.give_back(gpu, ring)

    # -------------------------------------------------------------------------------------- what moves

    def needs(self, layer: int, experts: Iterable[int]) -> None:
        """What a layer needs is known: nothing else of it, or of those before, is read or sent any more."""
        self._current = layer
        needed = dict.fromkeys((layer, expert) for expert in experts)
        for queue in (self._to_read, self._to_send):
            while queue and queue[0][0] <= layer:
                queue.popleft()
        for at, sent in enumerate(self.sent):
            for key in [key for key in sent if key[0] <= layer and key not in needed]:
                self.leave(at, key)
        for key in [key for key in self._read if key[0] <= layer and key not in needed]:
            self.done_with(key)
        on_their_way = self._read.keys() | {key for sent in self.sent for key in sent}
        self._to_read.extendleft(key for key in reversed(needed) if key not in on_their_way)

    def go_on(self, sending: Sequence[deque[Key]] | None = None) -> None:
        """Start the reads and uploads that there is room for: what `sending` has for each GPU, then what the
        next layers will probably need."""
        still = []
        for ticket, ring, slot in self._freed_later:
            if ticket.is_done:
                ring.append(slot)
            else:
                still.append((ticket, ring, slot))
        self._freed_later = still
        for sent in self.sent:
            for key, held in sent.items():
                arrival = held.entry.ticket
                if held.is_from_ring and arrival is not None and arrival.is_done and not arrival.has_failed:
                    self.done_with(key)
                    held.is_from_ring = False
        self._read_on()
        for at, queue in enumerate(sending or ()):
            if queue and not self._gpu_rings[at]:
                self._make_room_on(at)
            for key in list(queue):
                if not self._gpu_rings[at]:
                    break
                if self._send(at, key):
                    queue.remove(key)
        if self._to_send and not any(sending or ()):
            self._send_ahead()

    def source_of(self, key: Key) -> SlotEntry | None:
        """Where DRAM has an expert, or will have it."""
        return self._read.get(key) or self.slots.dram.find(key)

    def wait_for(self, key: Key) -> None:
        """Wait for the bytes in DRAM; a read that failed before anybody waited for it is tried again."""
        entry = self.source_of(key)
        assert entry is not None
        if entry.ticket is None:
            return
        try:
            entry.ticket.wait()
        except Exception:
            if key in self._read and key not in self._ahead:
                raise
            self._ahead.discard(key)
            self.slots.read_again(key, entry).wait()

    def done_with(self, key: Key) -> None:
        """DRAM's ring may use the slot of an expert for another one."""
        entry = self._read.pop(key, None)
        self._ahead.discard(key)
        if entry is not None:
            if entry.is_moving and entry.ticket is not None:
                self.slots.cancel_read(entry.ticket)
            self._free(entry, self._ring)

    def leave(self, at: int, key: Key) -> None:
        """A GPU's ring may use the slot of an expert for another one."""
        held = self.sent[at].pop(key)
        self.slots.unpin(key)
        if held.is_from_ring:
            if held.entry.is_moving and held.entry.ticket is not None:
                with suppress(Exception):  # its source is overwritten next
                    held.entry.ticket.wait()
            self.done_with(key)
        self._free(held.entry, self._gpu_rings[at])

    def room_on(self, at: int) -> int:
        """Slots that a GPU's ring has in all."""
        return self._sizes[at]

    def make_room(self) -> None:
        """Wait until a slot of a ring becomes free, or give up what only later layers will need."""
        for ticket, _, _ in self._freed_later:
            with suppress(Exception):
                ticket.wait()
            return
        later = [key for key in self._read if key[0] != self._current]
        if later:
            self._to_read.append(later[-1])
            self.done_with(later[-1])

    def _make_room_on(self, at: int) -> None:
        """Give up what was sent for a later layer, where nothing else will leave the ring."""
        if not any(key[0] == self._current for key in self.sent[at]):
            for key in list(self.sent[at])[-1:]:
                self.leave(at, key)

    def _free(self, entry: SlotEntry, ring: list[int]) -> None:
        if entry.is_moving and entry.ticket is not None:
            self._freed_later.append((entry.ticket, ring, entry.slot))
        else:
            ring.append(entry.slot)

    def _read_on(self) -> None:
        while self._to_read and self._ring:
            key = self._to_read.popleft()
            if key in self._read or self.slots.find(key) is not None:
                continue
            entry = SlotEntry(self._ring.pop())
            self.slots.read_again(key, entry)
            self._read[key] = entry
            if key[0] != self._current:
                self._ahead.add(key)

    def _send(self, at: int, key: Key) -> bool:
        """Start an upload; False where DRAM does not have the expert yet."""
        source = self.source_of(key)
        if source is None or source.is_moving or (source.ticket is not None and source.ticket.has_failed):
            return False
        slot = self._gpu_rings[at].pop()
        ticket = self.slots.upload(at, key[0], slot, source.slot)
        self.slots.pin(key)
        self.sent[at][key] = _Sent(SlotEntry(slot, ticket), source, key in self._read)
        return True

    def _send_ahead(self) -> None:
        """Keep the links busy with what the next layers will probably need."""
        while self._to_send:
            key = self._to_send[0]
            at = max(range(len(self._gpu_rings)), key=lambda n: len(self._gpu_rings[n]))
            if not self._gpu_rings[at]:
                return
            found = self.slots.find(key)
            is_held = found is not None and found[0] is not self.slots.dram
            if not is_held and not any(key in sent for sent in self.sent) and not self._send(at, key):
                return
            self._to_send.popleft()


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
        outputs = x.new_empty(tokens * top_k, x.shape[1])
        inputs = {x.device: x}

        def compute(table: SlotTable, experts: list[int], entries: list[SlotEntry]) -> None:
            if table.tier.device not in inputs:
                inputs[table.tier.device] = x.to(table.tier.device)
            rows = torch.cat([self._rows(expert) for expert in experts])
            ids = self._ids.flatten()[rows].unsqueeze(1)
            here = inputs[table.tier.device]
            held = {e: table.weights(self._layer, entry) for e, entry in zip(experts, entries, strict=True)}
            ones = torch.ones(ids.shape, device=here.device)
            part = here[(rows // top_k).to(here.device)]
            y = self._pass.kernels.moe_apart(MoeCall(part, ids, ones, held, swiglu_limit, extras)).flatten(
                0, 1
            )
            outputs[rows.to(outputs.device)] = y.to(outputs.device)
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
