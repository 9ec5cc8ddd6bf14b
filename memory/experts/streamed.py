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

from memory.experts.lent_slots import LentSlots
from memory.experts.slot_table import Key, SlotEntry
from memory.experts.slots import ExpertSlots
from memory.experts.streaming import ring_slots
from memory.transfer import Ticket
from quant.kernels.interface import Kernels


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
        lent: LentSlots,
        kernels: Kernels,
        layers: Sequence[int],
        rankings: Sequence[Sequence[int]],
        hidden: int,
        flops_per_token: float,
        cpu_flops: float,
    ) -> None:
        self.slots = slots
        self._lent = lent
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
            self._ring = lent.borrow(slots.dram, max(2, ring_slots(slots.dram.arena.slots)))
        self._gpu_rings = [lent.borrow(gpu, ring_slots(gpu.arena.slots)) for gpu in slots.gpus]
        self._sizes = [len(ring) for ring in self._gpu_rings]
        self._freed_later: list[tuple[Ticket, list[int], int]] = []
        self._outputs: torch.Tensor | None = None
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
        self._lent.give_back(self.slots.dram, self._ring)
        for gpu, ring in zip(self.slots.gpus, self._gpu_rings, strict=True):
            self._lent.give_back(gpu, ring)

    def outputs(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Room for what a layer's experts make, `[rows, hidden]`: in host memory layers share it, since the
        system would clear new memory for each."""
        if like.device.type != "cpu":
            return like.new_empty(rows, like.shape[1])
        if self._outputs is None or len(self._outputs) < rows:
            self._outputs = None  # before there is other memory
            self._outputs = like.new_empty(rows, like.shape[1])
        return self._outputs[:rows]

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
