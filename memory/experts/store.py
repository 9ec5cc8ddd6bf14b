"""The expert store: where each routed expert is, how it gets where it is needed, and who computes it.

Experts live in slots of arenas: one arena per GPU (real or virtual) and one in DRAM; the rest is on
disk. For a layer's step the store
  - computes experts that a GPU holds on that GPU, and experts that DRAM holds on the CPU, or moves some
    of these to a GPU first, so that link and CPU are busy for equally long;
  - reads missing ones from disk on reader threads, which also rearrange them for the kernels;
  - takes in a guess at the next layer's experts and reads those ahead, behind everything needed now.

Results do not depend on any of this: each chosen expert's output is computed by itself and added in the
order of the router's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from contextlib import suppress

import torch

from memory.experts.copies import Carrier
from memory.experts.policy import EXCHANGE_MARGIN, Predictive, beside
from memory.experts.reader import ExpertFiles, ExpertReader, default_readers
from memory.experts.slot_table import Key, Place, Shelf
from memory.experts.step import ExpertStep
from memory.telemetry import Telemetry
from memory.tiers import Arena, Tier
from memory.transfer import Link, Priority, Ticket
from quant.errors import BudgetError
from quant.kernels.interface import Kernels

MIN_SLOTS = 2  # in DRAM: one expert at work, one that makes room
FILL_BATCH = 64  # experts on their way at once while filling

# Bytes per second at which the CPU computes experts that lie in DRAM, until a measurement says otherwise.
ASSUMED_CPU_BYTES_PER_S = 40e9


class ExpertStore:
    """Experts of all layers within fixed budgets. Used by one thread, the engine's.

    gpus      tiers of GPUs, none on a machine without
    dram      the tier of host memory; a BudgetError says how much it must have at least
    kernels   compute in all tiers, and say how an expert lies in a slot
    readers   threads that read experts from disk and rearrange them; by default as `default_readers` says
    hotness   `[layers, experts]`, shares of uses in an earlier profile: the hot ones are brought in first
    """

    def __init__(
        self,
        files: ExpertFiles,
        kernels: Kernels,
        dram: Tier,
        gpus: Sequence[Tier] = (),
        *,
        telemetry: Telemetry | None = None,
        hotness: torch.Tensor | None = None,
        readers: int | None = None,
        cpu_bytes_per_s: float = ASSUMED_CPU_BYTES_PER_S,
    ) -> None:
        self.files = files
        self.kernels = kernels
        self.telemetry = telemetry or Telemetry()
        total = files.layers * files.experts

        def shelf(tier: Tier) -> Shelf:
            layout = kernels.on(tier.device).slot_layout(files.hidden, files.width, files.format)
            is_pinned = tier is dram and any(gpu.device.type == "cuda" for gpu in gpus)
            return Shelf(Arena.filling(tier, layout.nbytes, total, pinned=is_pinned), files.layers, layout)

        self.dram = shelf(dram)
        self.layout = layout = self.dram.layout
        if self.dram.arena.slots < min(MIN_SLOTS, total):
            raise BudgetError(
                f"the DRAM budget of {dram.budget_bytes} bytes holds {self.dram.arena.slots} experts of "
                f"{layout.nbytes} bytes; at least {MIN_SLOTS} are needed"
            )
        self.gpus = [shelf(tier) for tier in gpus]
        self._carriers = [Carrier(gpu.tier, layout, gpu.layout) for gpu in self.gpus]
        # Where DRAM holds everything, GPUs hold copies; else an expert is in one place at a time.
        self.keeps_copies = self.dram.arena.slots >= total
        self._policies = [
            Predictive(files.experts, prior=None if hotness is None else hotness[layer].numpy())
            for layer in range(files.layers)
        ]
        self._used: list[list[int]] = [[] for _ in range(files.layers)]  # by each layer's newest step
        self.cpu_bytes_per_s = cpu_bytes_per_s
        self.busy: set[Key] = set()  # of the step under way: these must not leave
        self._foreseen: set[Key] = set()  # guessed for a step to come: these had better not
        self._leaving: list[tuple[Ticket, int]] = []  # DRAM slots, free once this has ended
        self._ahead: list[Ticket | None] = [None] * len(gpus)  # the last copy of a foreseen expert to each
        self._reader = ExpertReader(files, layout, self.telemetry, readers or default_readers())
        self._links = [
            Link(
                shelf.tier.name,
                self.telemetry,
                bytes_per_s=shelf.tier.link_bytes_per_s if shelf.tier.is_virtual else None,
            )
            for shelf in self.gpus
        ]
        self._fill()

    def close(self) -> None:
        """End the links and close the files."""
        self._reader.close()
        for link in self._links:
            link.close()
        for shelf in self._shelves:
            shelf.arena.close()

    @property
    def _shelves(self) -> tuple[Shelf, ...]:
        return (*self.gpus, self.dram)

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes allocated for experts in each tier."""
        return {shelf.tier.name: shelf.arena.nbytes for shelf in self._shelves}

    def residency(self) -> dict[str, int]:
        """Experts in each tier; those in none are on disk only."""
        return {shelf.tier.name: sum(len(layer) for layer in shelf.by_layer) for shelf in self._shelves}

    def expert_locations(self) -> list[list[str]]:
        """The tier that holds each expert, by layer and expert; `nvme` where none does."""
        tiers = [["nvme"] * self.files.experts for _ in range(self.files.layers)]
        for shelf in reversed(self._shelves):  # of copies, the GPU's counts
            for layer, places in enumerate(shelf.by_layer):
                for expert in list(places):  # a copy at once: another thread may look
                    tiers[layer][expert] = shelf.tier.name
        return tiers

    def wants_guesses(self, layer: int) -> bool:
        """True where experts of `layer` could be brought nearer: from disk, or from DRAM to a GPU."""
        shelves = self.gpus if self.keeps_copies else self._shelves
        return bool(shelves) and sum(len(shelf.by_layer[layer]) for shelf in shelves) < self.files.experts

    def acquire(self, layer: int, expert_ids: torch.Tensor) -> ExpertStep:
        """Begin a layer's step: `expert_ids` `[tokens, top_k]` int64. Reads and moves start now."""
        needed = sorted(set(expert_ids.flatten().tolist()))
        if self.gpus or not self.keeps_copies:  # else nothing ever moves
            self._policies[layer].used(needed, beside(self._used, layer))
            self._used[layer] = needed
            self._give_up_guesses(layer, needed)
        return ExpertStep(self, layer, expert_ids, needed)

    def prefetch(self, layer: int, expert_ids: Iterable[int]) -> None:
        """Bring nearer what `layer` will probably need, the likeliest first, as far as there is room.

        What is on disk is read; where DRAM holds everything, one expert at a time goes up each link. Nothing
        in use, on its way, or foreseen itself is displaced, and what is needed goes first.
        """
        guess = list(dict.fromkeys(expert_ids))
        self._policies[layer].expected(guess)
        self._foreseen = {(layer, expert) for expert in guess}
        self._cancel_reads(layer, guess)
        for expert in guess:
            found = self.find((layer, expert))
            if found is not None:
                is_here = found[0] is self.dram and not found[1].is_moving
                if self.keeps_copies and self.gpus and is_here:
                    self._copy_ahead((layer, expert))
                continue
            if not self.make_room(layer, Priority.PREFETCH):
                break
            self.read((layer, expert), Priority.PREFETCH)
        self.note_slots()

    def _copy_ahead(self, key: Key) -> None:
        """Copy a foreseen expert to its GPU, unless another one is still under way to it."""
        at = self._home(key)
        last = self._ahead[at]
        if last is None or last.is_done:
            self._ahead[at] = self.move_to_gpu(key, Priority.PREFETCH)

    def note_slots(self) -> None:
        """Tell the telemetry how many slots hold nothing."""
        for shelf in self._shelves:
            self.telemetry.set("slots", shelf.tier.name, shelf.arena.free)

    def _give_up_guesses(self, layer: int, needed: Iterable[int]) -> None:
        """Compare the guess with what is needed; take off the queues what need not be there.

        That is wrong guesses at the disk. On links all that waits: what is needed may be computed in DRAM.
        """
        guess = {expert for of, expert in self._foreseen if of == layer}
        self._foreseen = {key for key in self._foreseen if key[0] != layer}
        self.telemetry.add("guesses", "made", len(guess))
        self.telemetry.add("guesses", "right", len(guess.intersection(needed)))
        self._cancel_reads(layer, needed)
        for at, (shelf, link) in enumerate(zip(self.gpus, self._links, strict=True)):
            for expert, place in list(shelf.by_layer[layer].items()):
                if not place.foreseen or not place.is_moving:
                    continue
                if place.ticket is not None and link.cancel(place.ticket):
                    self._forget(shelf, (layer, expert))
                    self._ahead[at] = None
                    self.telemetry.add("prefetches", "cancelled")

    def _cancel_reads(self, layer: int, still_wanted: Iterable[int]) -> None:
        """Read no more of what was foreseen for `layer` and is not wanted any more, not even to its end."""
        for expert in self.dram.by_layer[layer].keys() - set(still_wanted):
            place = self.dram.by_layer[layer][expert]
            if place.foreseen and place.ticket is not None and self._reader.link.cancel(place.ticket):
                self.dram.remove((layer, expert))
                self._leaving.append((place.ticket, place.slot))  # parts may be on their way to it
                self.telemetry.add("prefetches", "cancelled")
        self.settle()

    @property
    def _spare(self) -> int:
        """DRAM slots kept free for what GPUs give back."""
        return 1 if self.gpus and not self.keeps_copies else 0

    def find(self, key: Key) -> tuple[Shelf, Place] | None:
        """Where an expert is or will be; one whose bytes failed to come is nowhere."""
        for shelf in self._shelves:
            place = shelf.find(key)
            if place is None:
                continue
            if place.ticket is None or not place.ticket.has_failed:
                return shelf, place
            self._forget(shelf, key)
        return None

    def _forget(self, shelf: Shelf, key: Key) -> None:
        shelf.arena.give_back(shelf.remove(key).slot)

    def _home(self, key: Key) -> int:
        """The GPU of an expert: neighbours lie on different GPUs, so that all links and memories work."""
        return (key[0] + key[1]) % len(self.gpus)

    def _fill(self) -> None:
        """Fill GPUs and DRAM at start, every layer its share, and wait for the bytes."""
        ranked = [policy.ranking() for policy in self._policies]
        keys = [(layer, expert) for place in zip(*ranked, strict=True) for layer, expert in enumerate(place)]
        at = 0
        while at < len(keys):
            room = min(self.dram.arena.free - self._spare, FILL_BATCH)
            if room <= 0:
                break
            batch, at = keys[at : at + room], at + room
            for ticket in [self.read(key, Priority.DEMAND) for key in batch]:
                ticket.wait()
            to_gpus = [key for key in batch if self.gpus]
            moves = [self.move_to_gpu(key) for key in to_gpus if self.gpus[self._home(key)].arena.free]
            for move in filter(None, moves):
                move.wait()
            self.settle()
        self.note_slots()

    def read(self, key: Key, priority: Priority) -> Ticket:
        """Read an expert from disk into a free DRAM slot; the caller has made sure there is one."""
        slot = self.dram.arena.take()
        assert slot is not None
        place = Place(slot, foreseen=priority is Priority.PREFETCH)
        self.dram.put(key, place)
        return self.read_into(key, place, priority)

    def read_into(self, key: Key, place: Place, priority: Priority) -> Ticket:
        """Read an expert into its place in DRAM, perhaps once more."""
        place.ticket = self._reader.read(key, self.dram.arena.slot(place.slot), priority)
        return place.ticket

    def hurry(self, place: Place) -> None:
        """What was foreseen is needed now."""
        if place.ticket is not None:
            self._reader.link.promote(place.ticket)

    def move_to_gpu(self, key: Key, priority: Priority = Priority.DEMAND) -> Ticket | None:
        """Move an expert that DRAM holds to its GPU, unless all there are worth about as much or in use.

        In exclusive mode the GPU's expert that leaves takes a spare DRAM slot, or is dropped (the disk
        has it) where none is free.
        """
        at = self._home(key)
        shelf, link, carrier = self.gpus[at], self._links[at], self._carriers[at]
        source = self.dram.find(key)
        assert source is not None
        slot = shelf.arena.take()
        out: torch.Tensor | None = None
        leaving: Key | None = None
        if slot is None:
            is_demand = priority is Priority.DEMAND
            leaving = self._worst(shelf, key[0], self.busy if is_demand else self.busy | self._foreseen)
            # A copy costs one transfer, which this step's use pays; an exchange costs two: later ones pay.
            margin = 1.0 if self.keeps_copies else EXCHANGE_MARGIN
            if leaving is None or self.worth(leaving) * margin >= self.worth(key):
                return None
            left = shelf.remove(leaving)
            slot = left.slot
            if left.foreseen:
                self.telemetry.add("prefetches", "dropped")
            self.telemetry.add("evictions", shelf.tier.name)
            if not self.keeps_copies:
                spare = self.dram.arena.take()
                out = None if spare is None else self.dram.arena.slot(spare)
        inside, outside = shelf.arena.slot(slot), self.dram.arena.slot(source.slot)
        telemetry, nbytes, gpu = self.telemetry, self.layout.nbytes, shelf.tier.name
        fence = carrier.fence()

        def work() -> None:
            if out is not None:
                carrier.take_back(out, inside, fence)
                telemetry.add("moved_bytes", f"{gpu} to dram", nbytes)
            carrier.bring(inside, outside, fence)

        ticket = link.submit([work], nbytes, priority)
        shelf.put(key, Place(slot, ticket, foreseen=priority is Priority.PREFETCH))
        if leaving is not None and out is not None:
            assert spare is not None
            self.dram.put(leaving, Place(spare, ticket))
        if not self.keeps_copies:
            self._leaving.append((ticket, self.dram.remove(key).slot))
        return ticket

    def settle(self, *, wait: bool = False) -> None:
        """Free the slots that nothing moves from or to any more."""
        still = []
        for ticket, slot in self._leaving:
            if wait:
                with suppress(Exception):  # whoever needs the bytes will find that they are not there
                    ticket.wait()
            if ticket.is_done:
                self.dram.arena.give_back(slot)
            else:
                still.append((ticket, slot))
        self._leaving = still

    def worth(self, key: Key) -> float:
        """How much an expert is worth keeping, among those of its layer."""
        return float(self._policies[key[0]].scores()[key[1]])

    def _worst(self, shelf: Shelf, layer: int, stay: Set[Key]) -> Key | None:
        """What leaves `shelf` for an expert of `layer`: of its own layer, or of the most overfull one."""

        def candidates(of: int) -> list[int]:
            places = shelf.by_layer[of].items()
            return [expert for expert, place in places if not place.is_moving and (of, expert) not in stay]

        if len(shelf.by_layer[layer]) >= shelf.quota:
            own = candidates(layer)
            if own:
                return layer, self._policies[layer].victim(own)
        for of in sorted(range(self.files.layers), key=lambda n: -len(shelf.by_layer[n])):
            others = candidates(of)
            if others:
                return of, self._policies[of].victim(others)
        return None

    def make_room(self, layer: int, priority: Priority = Priority.DEMAND) -> bool:
        """See that a DRAM slot is free for an expert of `layer`; False where all are in use or on their way.

        What is only foreseen displaces nothing that is foreseen, and leaves GPUs the slot they count on.
        """
        self.settle()
        is_demand = priority is Priority.DEMAND
        spare = 0 if is_demand else self._spare
        if self.dram.arena.free > spare:
            return True
        leaving = self._worst(self.dram, layer, self.busy | self._foreseen)
        if leaving is None and is_demand:
            leaving = self._worst(self.dram, layer, self.busy)
        if leaving is None:
            return False
        if self.dram.by_layer[leaving[0]][leaving[1]].foreseen:
            self.telemetry.add("prefetches", "dropped")
        self._forget(self.dram, leaving)
        self.telemetry.add("evictions", "dram")
        return True

    def wait_for_room(self, layer: int) -> bool:
        """As `make_room`, after everything that is on its way has arrived."""
        self.settle(wait=True)
        for places in self.dram.by_layer:
            for place in places.values():
                if place.ticket is not None:
                    with suppress(Exception):  # whoever needs the expert will find that it is not there
                        place.ticket.wait()
        return self.make_room(layer)
