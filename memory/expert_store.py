"""The expert store: where each routed expert is, how it gets where it is needed, and who computes it.

Experts live in slots of arenas: one arena per card (real or virtual) and one in DRAM; the rest is on
disk. For a layer's step the store
  - computes experts that a card holds on that card, and experts that DRAM holds on the CPU, or moves some
    of these to a card first, so that link and CPU are busy for equally long;
  - reads missing ones from disk on reader threads, which also rearrange them for the kernels;
  - takes in a guess at the next layer's experts and reads those ahead, behind everything needed now.

Results do not depend on any of this: each chosen expert's output is computed by itself and added in the
order of the router's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from memory.checkpoint import TensorEntry
from memory.disk import DirectFiles, coalesce
from memory.expert_policy import Predictive
from memory.shelf import Key, Place, Shelf
from memory.telemetry import Telemetry
from memory.tiers import Arena, Tier
from memory.transfer import Link, Priority, Ticket
from quant.errors import BudgetError
from quant.formats import Format
from quant.kernels import ExpertWeights, Kernels

LEAST_SLOTS = 2  # in DRAM: one expert at work, one that makes room
FILL_BATCH = 64  # experts on their way at once while filling

# Bytes per second at which the CPU computes experts that lie in DRAM, until a measurement says otherwise.
ASSUMED_CPU_BYTES_PER_S = 40e9


class ExpertFiles(Protocol):
    """Where experts are on disk and how their bytes are to be read; given by the model's family."""

    @property
    def layers(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def format(self) -> Format: ...

    def entries(self, layer: int, expert: int) -> list[TensorEntry]:
        """The tensors of one expert."""
        ...

    def weights(self, layer: int, expert: int, raw: dict[str, torch.Tensor]) -> ExpertWeights:
        """The expert's matrices from the raw bytes of its tensors, by name."""
        ...


class ExpertStore:
    """Experts of all layers within fixed budgets. Used by one thread, the engine's.

    cards     tiers of cards, none on a machine without
    dram      the tier of host memory; a BudgetError says how much it must have at least
    kernels   compute in all tiers, and say how an expert lies in a slot
    hotness   `[layers, experts]`, shares of uses in an earlier profile: the hot ones are brought in first
    """

    def __init__(
        self,
        files: ExpertFiles,
        kernels: Kernels,
        dram: Tier,
        cards: Sequence[Tier] = (),
        *,
        telemetry: Telemetry | None = None,
        hotness: torch.Tensor | None = None,
        readers: int = 4,
        cpu_bytes_per_s: float = ASSUMED_CPU_BYTES_PER_S,
    ) -> None:
        self.files = files
        self.layout = layout = kernels.slot_layout(files.hidden, files.width, files.format)
        self.kernels = kernels
        self.telemetry = telemetry or Telemetry()
        total = files.layers * files.experts
        self._cards = [Shelf(Arena.filling(tier, layout.nbytes, total), files.layers) for tier in cards]
        arena = Arena.filling(dram, layout.nbytes, total, pinned=bool(cards))
        if arena.slots < min(LEAST_SLOTS, total):
            raise BudgetError(
                f"the DRAM budget of {dram.budget_bytes} bytes holds {arena.slots} experts of "
                f"{layout.nbytes} bytes; at least {LEAST_SLOTS} are needed"
            )
        self._dram = Shelf(arena, files.layers)
        # Where DRAM holds everything, cards hold copies; else an expert is in one place at a time.
        self._keeps_copies = arena.slots >= total
        self._policies = [
            Predictive(files.experts, prior=None if hotness is None else hotness[layer].numpy())
            for layer in range(files.layers)
        ]
        self._cpu_bytes_per_s = cpu_bytes_per_s
        self._busy: set[Key] = set()
        self._leaving: list[tuple[Ticket, int]] = []  # DRAM slots that are free once a move has ended
        self._direct = DirectFiles()
        self._direct.open(
            sorted(
                {
                    e.file
                    for n in range(files.layers)
                    for x in range(files.experts)
                    for e in files.entries(n, x)
                }
            )
        )
        self._disk = Link("nvme", self.telemetry, workers=readers)
        self._links = [
            Link(shelf.tier.name, self.telemetry, bytes_per_s=shelf.tier.link_bytes_per_s)
            for shelf in self._cards
        ]
        self._fill()

    def close(self) -> None:
        """End the links and close the files."""
        for link in (self._disk, *self._links):
            link.close()
        self._direct.close()

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes allocated for experts in each tier."""
        return {shelf.tier.name: shelf.arena.nbytes for shelf in (*self._cards, self._dram)}

    def residency(self) -> dict[str, int]:
        """Experts in each tier; those in none are on disk only."""
        return {
            shelf.tier.name: sum(len(layer) for layer in shelf.by_layer)
            for shelf in (*self._cards, self._dram)
        }

    def holds_all(self, layer: int) -> bool:
        """True where no expert of `layer` would have to be read from disk."""
        held = set(self._dram.by_layer[layer])
        for shelf in self._cards:
            held.update(shelf.by_layer[layer])
        return len(held) == self.files.experts

    def acquire(self, layer: int, expert_ids: torch.Tensor) -> ExpertStep:
        """Begin a layer's step: `expert_ids` `[tokens, top_k]` int64. Reads and moves start now."""
        needed = sorted(set(expert_ids.flatten().tolist()))
        self._policies[layer].used(needed)
        return ExpertStep(self, layer, expert_ids, needed)

    def prefetch(self, layer: int, expert_ids: Iterable[int]) -> None:
        """Read experts that `layer` will probably need, as far as room can be made without loss.

        Nothing in use, on its way, or worth more than its successor is displaced, and needed reads go first.
        """
        guess = sorted(set(expert_ids))
        self._policies[layer].expected(guess)
        for expert in guess:
            key = (layer, expert)
            if self._find(key) is not None:
                continue
            if self._dram.arena.free <= self._spare and not self._make_room(
                layer, guess, own_layer_only=True
            ):
                return
            self._read(key, Priority.PREFETCH)

    @property
    def _spare(self) -> int:
        """DRAM slots kept free for what cards give back."""
        return 1 if self._cards and not self._keeps_copies else 0

    def _find(self, key: Key) -> tuple[Shelf, Place] | None:
        for shelf in (*self._cards, self._dram):
            place = shelf.find(key)
            if place is not None:
                return shelf, place
        return None

    def _home(self, key: Key) -> int:
        """The card of an expert: neighbours lie on different cards, so that all links and memories work."""
        return (key[0] + key[1]) % len(self._cards)

    def _fill(self) -> None:
        """Fill cards and DRAM at start, every layer its share, and wait for the bytes."""
        ranked = [policy.ranking() for policy in self._policies]
        keys = [(layer, expert) for place in zip(*ranked, strict=True) for layer, expert in enumerate(place)]
        at = 0
        while at < len(keys):
            room = min(self._dram.arena.free - self._spare, FILL_BATCH)
            if room <= 0:
                return
            batch, at = keys[at : at + room], at + room
            for ticket in [self._read(key, Priority.DEMAND).ticket for key in batch]:
                assert ticket is not None
                ticket.wait()
            for key in batch:
                if self._cards and self._cards[self._home(key)].arena.free:
                    self._move_to_card(key)
            self._settle(wait=True)

    def _read(self, key: Key, priority: Priority) -> Place:
        """Read an expert from disk into a free DRAM slot; the caller has made sure there is one."""
        slot = self._dram.arena.take()
        assert slot is not None
        target = self._dram.arena.slot(slot)

        def work() -> None:
            raw: dict[str, torch.Tensor] = {}
            for part in coalesce(self.files.entries(*key)):
                raw |= self._direct.read(part)
            expert = self.files.weights(*key, raw)
            self.layout.pack_into(target, expert.w1, expert.w3, expert.w2)

        ticket = self._disk.submit(work, self.layout.nbytes, priority)
        place = Place(slot, ticket, foreseen=priority is Priority.PREFETCH)
        self._dram.put(key, place)
        return place

    def _move_to_card(self, key: Key) -> None:
        """Move an expert that DRAM holds to its card, unless all there are worth more or in use.

        In exclusive mode the card's expert that leaves takes a spare DRAM slot, or is dropped (the disk
        has it) where none is free.
        """
        at = self._home(key)
        shelf, link = self._cards[at], self._links[at]
        source = self._dram.find(key)
        assert source is not None
        slot = shelf.arena.take()
        out: torch.Tensor | None = None
        leaving: Key | None = None
        if slot is None:
            leaving = self._worst(shelf, key[0], lambda other: other != key)
            if leaving is None or self._worth(leaving) > self._worth(key):
                return
            slot = shelf.remove(leaving).slot
            if not self._keeps_copies:
                spare = self._dram.arena.take()
                out = None if spare is None else self._dram.arena.slot(spare)
        inside, outside = shelf.arena.slot(slot), self._dram.arena.slot(source.slot)
        telemetry, nbytes, card = self.telemetry, self.layout.nbytes, shelf.tier.name

        def work() -> None:
            if out is not None:
                out.copy_(inside)
                telemetry.add("moved_bytes", f"{card} to dram", nbytes)
            inside.copy_(outside)

        ticket = link.submit(work, nbytes, Priority.DEMAND)
        shelf.put(key, Place(slot, ticket))
        if leaving is not None and out is not None:
            assert spare is not None
            self._dram.put(leaving, Place(spare, ticket))
        if not self._keeps_copies:
            self._leaving.append((ticket, self._dram.remove(key).slot))

    def _settle(self, *, wait: bool = False) -> None:
        """Free the slots of experts whose move has ended."""
        still = []
        for ticket, slot in self._leaving:
            if wait:
                ticket.wait()
            if ticket.is_done:
                self._dram.arena.give_back(slot)
            else:
                still.append((ticket, slot))
        self._leaving = still

    def _worth(self, key: Key) -> float:
        return float(self._policies[key[0]].scores()[key[1]])

    def _worst(self, shelf: Shelf, layer: int, allowed: Callable[[Key], bool]) -> Key | None:
        """What leaves `shelf` for an expert of `layer`: of its own layer, or of the most overfull one."""

        def candidates(of: int) -> list[int]:
            places = shelf.by_layer[of].items()
            return [
                e for e, p in places if not p.is_moving and (of, e) not in self._busy and allowed((of, e))
            ]

        if len(shelf.by_layer[layer]) >= shelf.quota:
            own = candidates(layer)
            if own:
                return layer, self._policies[layer].victim(own)
        for of in sorted(range(self.files.layers), key=lambda n: -len(shelf.by_layer[n])):
            others = candidates(of)
            if others:
                return of, self._policies[of].victim(others)
        return None

    def _make_room(self, layer: int, wanted: Iterable[int] = (), *, own_layer_only: bool = False) -> bool:
        """Free a DRAM slot; False where everything is in use, on its way or among `wanted`."""
        self._settle()
        if self._dram.arena.free > self._spare:
            return True
        keep = set(wanted)

        def allowed(key: Key) -> bool:
            return key[0] != layer or key[1] not in keep

        leaving = self._worst(self._dram, layer, allowed)
        if leaving is None or (own_layer_only and leaving[0] != layer):
            return False
        place = self._dram.remove(leaving)
        if place.foreseen:
            self.telemetry.add("prefetches", "dropped")
        self._dram.arena.give_back(place.slot)
        return True


class ExpertStep:
    """One layer's experts for one batch, between `acquire` and the sum of their outputs."""

    def __init__(self, store: ExpertStore, layer: int, expert_ids: torch.Tensor, needed: list[int]) -> None:
        self._store = store
        self._layer = layer
        self._ids = expert_ids
        self._later = needed
        self._now: list[int] = []
        self._count_hits(needed)
        self._begin()

    def run(self, x: torch.Tensor, weights: torch.Tensor, swiglu_limit: float) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs: x `[tokens, hidden]`, weights `[tokens, top_k]`."""
        tokens, top_k = self._ids.shape
        outputs = torch.empty(tokens * top_k, x.shape[1], dtype=x.dtype)
        try:
            while self._now:
                self._compute_wave(x, outputs, swiglu_limit)
                self._release()
                self._begin()
        finally:
            self._release()
        return (outputs.view(tokens, top_k, -1) * weights.unsqueeze(-1)).sum(1)

    def _count_hits(self, needed: list[int]) -> None:
        for expert in needed:
            found = self._store._find((self._layer, expert))
            self._store.telemetry.add("hits", "nvme" if found is None else found[0].tier.name)

    def _begin(self) -> None:
        """Take as many of the remaining experts as slots can be found for; start what must move."""
        store, layer = self._store, self._layer
        store._settle()
        missing: list[int] = []
        waiting: list[int] = []
        in_dram: list[int] = []
        for expert in self._later:  # what is here already must not make room for what is not
            found = store._find((layer, expert))
            if found is None:
                missing.append(expert)
                continue
            shelf, place = found
            store._busy.add((layer, expert))
            self._now.append(expert)
            if place.foreseen:
                place.foreseen = False
                store.telemetry.add("prefetches", "used")
            if place.is_moving and place.ticket is not None:
                store._disk.promote(place.ticket)
            elif shelf is store._dram:
                in_dram.append(expert)
        for expert in missing:
            if store._dram.arena.free == 0:
                store._make_room(layer)
            if store._dram.arena.free > 0:
                store._read((layer, expert), Priority.DEMAND)
                store._busy.add((layer, expert))
                self._now.append(expert)
            else:
                waiting.append(expert)
        if waiting and not self._now:
            store._settle(wait=True)
            store._make_room(layer)
            if store._dram.arena.free == 0:
                raise BudgetError("no DRAM slot can be freed for an expert; raise the DRAM budget")
            self._later = waiting
            self._begin()
            return
        self._later = waiting
        self._fetch_some(in_dram)

    def _fetch_some(self, in_dram: list[int]) -> None:
        """Move the most valuable of the experts in DRAM to cards, as many as cost model says."""
        store = self._store
        if not store._cards or not in_dram:
            return
        ranked = sorted(in_dram, key=lambda e: -store._worth((self._layer, e)))
        speeds = [shelf.tier.link_bytes_per_s or float("inf") for shelf in store._cards]
        for expert in ranked[: fetch_count(len(ranked), sum(speeds), store._cpu_bytes_per_s)]:
            store._move_to_card((self._layer, expert))

    def _compute_wave(self, x: torch.Tensor, outputs: torch.Tensor, swiglu_limit: float) -> None:
        """Compute what is here, tier by tier, then each of the others as it arrives."""
        store, layer = self._store, self._layer
        ready: dict[str, dict[int, ExpertWeights]] = {}
        moving: list[tuple[Ticket, str, int, ExpertWeights]] = []
        for expert in self._now:
            found = store._find((layer, expert))
            assert found is not None
            shelf, place = found
            weights = store.layout.views(shelf.arena.slot(place.slot))
            if place.is_moving and place.ticket is not None:
                moving.append((place.ticket, shelf.tier.name, expert, weights))
            else:
                if place.ticket is not None:
                    place.ticket.wait()
                ready.setdefault(shelf.tier.name, {})[expert] = weights
        for tier, experts in ready.items():
            self._compute(tier, experts, x, outputs, swiglu_limit)
        for ticket, tier, expert, weights in moving:
            ticket.wait()
            self._compute(tier, {expert: weights}, x, outputs, swiglu_limit)

    def _compute(
        self,
        tier: str,
        experts: dict[int, ExpertWeights],
        x: torch.Tensor,
        outputs: torch.Tensor,
        swiglu_limit: float,
    ) -> None:
        """Outputs of `experts` for the tokens that chose them, into their rows of `outputs`."""
        flat = self._ids.flatten()
        rows = torch.isin(flat, torch.tensor(list(experts))).nonzero().squeeze(1)
        ids = flat[rows].unsqueeze(1)  # [rows, 1]
        ones = torch.ones(len(rows), 1)
        inputs = x[rows // self._ids.shape[1]]
        outputs[rows] = self._store.kernels.moe(inputs, ids, ones, experts, swiglu_limit)
        self._store.telemetry.add("computed", tier, len(experts))

    def _release(self) -> None:
        """These experts may leave again; one whose bytes failed to come is forgotten, to be read anew."""
        for expert in self._now:
            found = self._store._find((self._layer, expert))
            if found is not None and found[1].ticket is not None and found[1].ticket.has_failed:
                shelf, place = found
                shelf.remove((self._layer, expert))
                shelf.arena.give_back(place.slot)
        self._store._busy.difference_update((self._layer, expert) for expert in self._now)
        self._now = []


def fetch_count(missing: int, link_bytes_per_s: float, cpu_bytes_per_s: float) -> int:
    """How many of `missing` experts in DRAM to move to cards so that links and CPU finish together."""
    if link_bytes_per_s == float("inf"):
        return missing
    return round(missing * link_bytes_per_s / (link_bytes_per_s + cpu_bytes_per_s))
