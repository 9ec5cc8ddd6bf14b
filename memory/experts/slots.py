"""The expert slots of all tiers: placement, movement and eviction of experts.

GPUs and DRAM each have a slot table; the rest is on disk. Where DRAM holds every expert, GPUs hold copies;
otherwise placement is exclusive, and an expert that leaves a GPU takes the DRAM slot of the one that replaces
it.
Used by one thread, the engine's; bytes move on the threads of links and readers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

from memory.experts.at_hand import AtHand
from memory.experts.copies import SlotCopier
from memory.experts.homes import homes_of, shares_of
from memory.experts.policy import EXCHANGE_MARGIN, ExpertPolicy
from memory.experts.reader import ExpertFiles, ExpertReader
from memory.experts.slot_table import Key, SlotEntry, SlotTable
from memory.telemetry import Telemetry
from memory.tiers import Arena, Tier
from memory.transfer import Link, Priority, Ticket
from quant.errors import BudgetError, FormatError
from quant.kernels.interface import Kernels, SlotLayout

logger = logging.getLogger(__name__)

MIN_SLOTS = 2  # in DRAM: one expert in use, one being replaced


@dataclass(frozen=True)
class Claimed:
    """A pinned expert: where it is or will be, and whether it was missing."""

    expert: int
    table: SlotTable
    entry: SlotEntry
    was_missing: bool = False


class ExpertSlots:
    """Experts of all layers in the slots of GPUs and DRAM.

    policies          one per layer: ranks experts and chooses which to evict
    gpus              none are used where their kernels have no slots for these formats: a warning says so
    placed            of each layer, how many experts each GPU and then DRAM is to hold at first; None: as
                      many as there are slots, the same number of each layer
    lent_bytes        of each GPU's slots, what a long chunk of a prompt computes with meanwhile
    cpu_bytes_per_s   how fast the CPU computes what DRAM holds; decides how much is moved to GPUs instead

    Raises BudgetError where DRAM has room for fewer than `MIN_SLOTS` experts.
    """

    def __init__(
        self,
        files: ExpertFiles,
        kernels: Kernels,
        dram: Tier,
        gpus: Sequence[Tier],
        policies: Sequence[ExpertPolicy],
        telemetry: Telemetry,
        *,
        readers: int,
        cpu_bytes_per_s: float,
        lent_bytes: int = 0,
        placed: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.telemetry = telemetry
        self._policies = policies
        self.cpu_bytes_per_s = cpu_bytes_per_s
        total = files.layers * files.experts

        def table(tier: Tier) -> SlotTable:
            layouts = layouts_of(files, kernels.on(tier.device))
            is_pinned = tier is dram and any(gpu.device.type == "cuda" for gpu in gpus)
            slot_bytes = max(layout.nbytes for layout in layouts)
            lent = 0 if tier is dram else lent_bytes
            return SlotTable(
                Arena.filling(tier, slot_bytes, total, pinned=is_pinned, lent_bytes=lent), layouts
            )

        self.dram = table(dram)
        if self.dram.arena.slots < min(MIN_SLOTS, total):
            arena = self.dram.arena
            raise BudgetError(
                f"the DRAM budget of {dram.budget_bytes} bytes holds {arena.slots} experts of "
                f"{arena.slot_bytes} bytes, but at least {MIN_SLOTS} are needed; raise --dram-budget"
            )
        self.gpus: list[SlotTable] = []
        try:
            self.gpus = [table(tier) for tier in gpus]
        except FormatError as error:
            logger.warning("all experts stay in DRAM and are computed on the CPU: %s", error)
        even = list(zip(*(shares_of(gpu.arena.slots, files.layers) for gpu in self.gpus), strict=True))
        room = even if placed is None else [layer[: len(self.gpus)] for layer in placed]
        self.on_gpus_first = [sum(layer) for layer in room] if self.gpus else [0] * files.layers
        self.held_first = [files.experts] * files.layers if placed is None else [sum(of) for of in placed]
        self._homes = [
            homes_of(of, policy.ranking(), layer)
            for layer, (of, policy) in enumerate(zip(room, policies, strict=True))
        ] if self.gpus else []  # fmt: skip
        # With GPUs, where an expert is computed is decided anew in each step.
        self.at_hand = None if self.gpus else AtHand(self.dram, files.layers, files.experts)
        self.dram.observer = self.at_hand
        self.gpus_rest = False  # while a step runs that finds experts on GPUs by itself, none may leave there
        self.keeps_copies = self.dram.arena.slots >= total
        if self.keeps_copies:
            self.held_first = [files.experts] * files.layers
        self._copiers = [SlotCopier(gpu.tier, self.dram.layouts, gpu.layouts) for gpu in self.gpus]
        self._links = [
            Link(tier.name, telemetry, bytes_per_s=tier.link_bytes_per_s if tier.is_virtual else None)
            for tier in (gpu.tier for gpu in self.gpus)
        ]
        self._reader = ExpertReader(files, self.dram.layouts, telemetry, readers)
        self._claimed: set[Key] = set()  # pinned by the current step
        self._predicted: Set[Key] = frozenset()  # expected by a coming step; evicted last
        self._leaving: list[tuple[Ticket, int]] = []  # DRAM slots, free once this has ended

    def close(self) -> None:
        """Stop the links and close the files."""
        self._reader.close()
        for link in self._links:
            link.close()
        for table in self.tables:
            table.arena.close()

    # ------------------------------------------------------------------------------------------ where

    @property
    def tables(self) -> tuple[SlotTable, ...]:
        """Those of the GPUs, then DRAM's."""
        return (*self.gpus, self.dram)

    def find(self, key: Key) -> tuple[SlotTable, SlotEntry] | None:
        """Where an expert is or will be; one whose transfer failed is nowhere."""
        for table in self.tables:
            entry = table.find(key)
            if entry is None:
                continue
            if entry.ticket is None or not entry.ticket.has_failed:
                return table, entry
            table.drop(key)
        return None

    def home(self, key: Key) -> int:
        """The GPU of an expert: see `homes_of`."""
        return self._homes[key[0]][key[1]]

    def score(self, key: Key) -> float:
        """The value of keeping an expert, among those of its layer."""
        return float(self._policies[key[0]].scores()[key[1]])

    @property
    def reserved(self) -> int:
        """DRAM slots kept free for experts evicted from GPUs."""
        return 1 if self.gpus and not self.keeps_copies else 0

    def report_free(self) -> None:
        """Report the number of free slots to the telemetry."""
        for table in self.tables:
            self.telemetry.set("slots", table.tier.name, table.arena.free)

    # ----------------------------------------------------------------------------------------- a step

    def claim(self, layer: int, experts: Sequence[int]) -> tuple[list[Claimed], list[int]]:
        """Pin as many of `experts` as there are slots for, and start the transfers they need.

        Returns the pinned ones, at least one, and those that must wait for a release. Raises BudgetError
        where no slot can be freed for any.
        """
        self.settle()
        claimed: list[Claimed] = []
        missing: list[int] = []
        waiting: list[int] = []
        for expert in experts:  # resident experts must not be evicted for missing ones
            found = self.find((layer, expert))
            if found is None:
                missing.append(expert)
            else:
                claimed.append(self._claim_found(layer, expert, *found))
        for expert in missing:
            if self.make_room(layer):
                self.read((layer, expert), Priority.DEMAND)
                entry = self.dram.by_layer[layer][expert]
                self._claimed.add((layer, expert))
                claimed.append(Claimed(expert, self.dram, entry, was_missing=True))
            else:
                waiting.append(expert)
        if waiting and not claimed:
            self._wait_for_room(layer)
            return self.claim(layer, experts)
        self._move_some_to_gpus(layer, claimed)
        self.report_free()
        return claimed, waiting

    def release(self, layer: int, claimed: Iterable[Claimed]) -> None:
        """Unpin these experts."""
        self._claimed.difference_update((layer, held.expert) for held in claimed)

    def arrive(self, layer: int, claimed: Claimed) -> Claimed:
        """Wait for a claimed expert's bytes and return where they are: elsewhere if the transfer failed.

        Failures of earlier reads, prefetches and transfers to a GPU are retried once. Raises the error of a
        read that was started for this claim.
        """
        ticket = claimed.entry.ticket
        if ticket is None:
            return claimed
        try:
            ticket.wait()
        except Exception:
            if claimed.was_missing:
                raise
            if claimed.table is not self.dram:
                return self._without_gpu(layer, claimed.expert)
            self._read_into((layer, claimed.expert), claimed.entry, Priority.DEMAND).wait()
        return claimed

    @property
    def claims(self) -> Set[Key]:
        """Experts that are pinned now."""
        return self._claimed

    def _claim_found(self, layer: int, expert: int, table: SlotTable, entry: SlotEntry) -> Claimed:
        self._claimed.add((layer, expert))
        if entry.is_unused_prefetch:
            entry.is_unused_prefetch = False
            self.telemetry.add("prefetches", "used")
        if entry.is_moving and entry.ticket is not None:
            self._reader.link.promote(entry.ticket)
        return Claimed(expert, table, entry)

    def _move_some_to_gpus(self, layer: int, claimed: list[Claimed]) -> None:
        """Move the most valuable experts in DRAM to GPUs, as many as pays off; updates `claimed`."""
        in_dram = {
            held.expert: at
            for at, held in enumerate(claimed)
            if held.table is self.dram and not held.was_missing and not held.entry.is_moving
        }
        if not self.gpus or not in_dram or self.gpus_rest:
            return
        speed = sum(table.tier.link_bytes_per_s or float("inf") for table in self.gpus)
        if not self.keeps_copies:
            speed /= 2  # another expert comes back
        ranked = sorted(in_dram, key=lambda expert: -self.score((layer, expert)))
        for expert in ranked[: fetch_count(len(ranked), speed, self.cpu_bytes_per_s)]:
            self.move_to_gpu((layer, expert))
        for expert, at in in_dram.items():
            found = self.find((layer, expert))
            if found is not None:
                claimed[at] = Claimed(expert, *found)

    def _without_gpu(self, layer: int, expert: int) -> Claimed:
        """The DRAM copy of an expert that did not reach its GPU, read again if necessary."""
        key = layer, expert
        found = self.find(key)
        if found is None:
            if not self.make_room(layer):
                self._wait_for_room(layer)
            self.read(key, Priority.DEMAND)
            found = self.dram, self.dram.by_layer[layer][expert]
        table, entry = found
        if entry.ticket is not None:
            entry.ticket.wait()
        return Claimed(expert, table, entry, was_missing=True)

    # ------------------------------------------------------------------------------------- transfers

    def read(self, key: Key, priority: Priority) -> Ticket:
        """Read an expert from disk into a free DRAM slot; the caller ensures that there is one."""
        slot = self.dram.arena.take()
        assert slot is not None
        entry = SlotEntry(slot, is_unused_prefetch=priority is Priority.PREFETCH)
        self.dram.put(key, entry)
        return self._read_into(key, entry, priority)

    def _read_into(self, key: Key, entry: SlotEntry, priority: Priority) -> Ticket:
        entry.ticket = self._reader.read(key, self.dram.arena.slot(entry.slot), priority)
        return entry.ticket

    def move_to_gpu(self, key: Key, priority: Priority = Priority.DEMAND) -> Ticket | None:
        """Move an expert from DRAM to its GPU, unless all experts there are worth about as much or are in
        use.

        In exclusive mode the GPU's expert that leaves takes a spare DRAM slot, or is dropped (the disk
        has it) where none is free.
        """
        at = self.home(key)
        table, source = self.gpus[at], self.dram.find(key)
        assert source is not None
        slot = table.arena.take()
        spare: int | None = None
        leaving: Key | None = None
        if slot is None:
            stay = self._claimed if priority is Priority.DEMAND else self._claimed | self._predicted
            leaving = self.victim(table, key[0], stay)
            # A copy costs one transfer, which this step's use repays; an exchange costs two, which later uses
            # repay.
            margin = 1.0 if self.keeps_copies else EXCHANGE_MARGIN
            if leaving is None or self.score(leaving) * margin >= self.score(key):
                return None
            slot = self.evict(table, leaving)
            spare = None if self.keeps_copies else self.dram.arena.take()
        nbytes = self.dram.layouts[key[0]].nbytes
        exchange = self._exchange(at, (key[0], slot, source.slot), leaving, spare)
        ticket = self._links[at].submit([exchange], nbytes, priority)
        table.put(key, SlotEntry(slot, ticket, is_unused_prefetch=priority is Priority.PREFETCH))
        if leaving is not None and spare is not None:
            self.dram.put(leaving, SlotEntry(spare, ticket))
        if not self.keeps_copies:
            self._leaving.append((ticket, self.dram.remove(key).slot))
        return ticket

    def _exchange(
        self, at: int, coming: tuple[int, int, int], leaving: Key | None, spare: int | None
    ) -> Callable[[], None]:
        """Runs on the link: copy what leaves the GPU's slot to DRAM's `spare`, then what comes into the slot.

        coming: its layer, the GPU's slot and DRAM's.
        """
        copier, telemetry = self._copiers[at], self.telemetry
        layer, slot, source = coming
        name, inside = self.gpus[at].tier.name, self.gpus[at].arena.slot(slot)
        outside = self.dram.arena.slot(source)
        kept = None if spare is None else self.dram.arena.slot(spare)
        fence = copier.fence()

        def work() -> None:
            if kept is not None and leaving is not None:
                copier.download(leaving[0], kept, inside, fence)
                telemetry.add("moved_bytes", f"{name} to dram", self.dram.layouts[leaving[0]].nbytes)
            copier.upload(layer, inside, outside, fence)

        return work

    def cancel_reads(self, layer: int, still_wanted: Iterable[int]) -> None:
        """Cancel prefetches for `layer` that are no longer needed, even reads in progress."""
        for expert in self.dram.by_layer[layer].keys() - set(still_wanted):
            entry = self.dram.by_layer[layer][expert]
            if not entry.is_unused_prefetch or entry.ticket is None:
                continue
            if self._reader.link.cancel(entry.ticket):
                self.dram.remove((layer, expert))
                self._leaving.append((entry.ticket, entry.slot))  # parts may be in flight to it
                self.telemetry.add("prefetches", "cancelled")
        self.settle()

    def cancel_uploads(self, layer: int) -> None:
        """Cancel queued prefetch copies of `layer` to GPUs: DRAM has what is needed."""
        for table, link in zip(self.gpus, self._links, strict=True):
            for expert, entry in list(table.by_layer[layer].items()):
                if not entry.is_unused_prefetch or not entry.is_moving:
                    continue
                if entry.ticket is not None and link.cancel(entry.ticket):
                    table.drop((layer, expert))
                    self.telemetry.add("prefetches", "cancelled")

    def settle(self, *, wait: bool = False) -> None:
        """Free the slots with no transfers left, and take in what has arrived."""
        still = []
        for ticket, slot in self._leaving:
            if wait:
                with suppress(Exception):  # the error surfaces where the bytes are needed
                    ticket.wait()
            if ticket.is_done:
                self.dram.arena.give_back(slot)
            else:
                still.append((ticket, slot))
        self._leaving = still
        if self.at_hand is not None:
            self.at_hand.publish()

    # ------------------------------------------------------------------------------ passing prompts

    def pin(self, key: Key) -> None:
        """No step may evict the expert until it is unpinned."""
        self._claimed.add(key)

    def unpin(self, key: Key) -> None:
        """The expert may be evicted."""
        self._claimed.discard(key)

    def read_again(self, key: Key, entry: SlotEntry) -> Ticket:
        """Read an expert into a slot that was borrowed, or whose read has failed."""
        return self._read_into(key, entry, Priority.DEMAND)

    def cancel_read(self, ticket: Ticket) -> None:
        """Nobody needs it any more."""
        self._reader.link.cancel(ticket)

    def upload(self, at: int, layer: int, slot: int, source: int) -> Ticket:
        """Copy an expert of `layer` from a slot in DRAM to one of a GPU, beside what the tables say."""
        copier = self._copiers[at]
        inside, outside = self.gpus[at].arena.slot(slot), self.dram.arena.slot(source)
        fence = copier.fence()
        nbytes = self.dram.layouts[layer].nbytes
        return self._links[at].submit(
            [lambda: copier.upload(layer, inside, outside, fence)], nbytes, Priority.DEMAND
        )

    # ------------------------------------------------------------------------------------------ room

    def protect(self, predicted: Set[Key]) -> None:
        """Experts that a coming step is expected to need: evicted only as a last resort."""
        self._predicted = predicted

    def make_room(self, layer: int, priority: Priority = Priority.DEMAND) -> bool:
        """Ensure that a DRAM slot is free for an expert of `layer`; False if all are in use or in flight.

        A prefetch does not displace another prefetch, and leaves GPUs their reserved slot.
        """
        self.settle()
        is_demand = priority is Priority.DEMAND
        if self.dram.arena.free > (0 if is_demand else self.reserved):
            return True
        leaving = self.victim(self.dram, layer, self._claimed | self._predicted)
        if leaving is None and is_demand:
            leaving = self.victim(self.dram, layer, self._claimed)
        if leaving is None:
            return False
        self.dram.arena.give_back(self.evict(self.dram, leaving))
        return True

    def _wait_for_room(self, layer: int) -> None:
        """Like `make_room`, after all transfers in flight have ended. Raises BudgetError."""
        self.wait_for_transfers()
        if not self.make_room(layer):
            raise BudgetError("no DRAM slot can be freed for an expert; raise the DRAM budget")

    def wait_for_transfers(self) -> None:
        """Until all that are in flight have ended."""
        self.settle(wait=True)
        for table in self.tables:
            for entries in table.by_layer:
                for entry in entries.values():
                    if entry.ticket is not None:
                        with suppress(Exception):  # the error surfaces where the expert is needed
                            entry.ticket.wait()

    def evict(self, table: SlotTable, key: Key) -> int:
        """Remove an expert from a table and return its slot."""
        entry = table.remove(key)
        if entry.is_unused_prefetch:
            self.telemetry.add("prefetches", "dropped")
        self.telemetry.add("evictions", table.tier.name)
        return entry.slot

    def victim(self, table: SlotTable, layer: int, stay: Set[Key]) -> Key | None:
        """The expert to evict from `table` for one of `layer`: from its own layer, or the one furthest over
        its share."""

        def candidates(of: int) -> list[int]:
            entries = table.by_layer[of].items()
            return [expert for expert, entry in entries if not entry.is_moving and (of, expert) not in stay]

        if table.count(layer) >= table.quota:
            own = candidates(layer)
            if own:
                return layer, self._policies[layer].victim(own)
        for of in sorted(range(len(table.by_layer)), key=lambda n: -table.count(n)):
            others = candidates(of)
            if others:
                return of, self._policies[of].victim(others)
        return None


def fetch_count(missing: int, link_bytes_per_s: float, cpu_bytes_per_s: float) -> int:
    """How many of `missing` experts in DRAM to move to GPUs so that links and CPU finish together."""
    if link_bytes_per_s == float("inf"):
        return missing
    return round(missing * link_bytes_per_s / (link_bytes_per_s + cpu_bytes_per_s))


def layouts_of(files: ExpertFiles, kernels: Kernels) -> list[SlotLayout]:
    """The slot layout of each layer; layers with the same formats share one."""
    layouts: dict[tuple[str, ...], SlotLayout] = {}
    found = []
    for layer in range(files.layers):
        formats = files.formats(layer)
        names = tuple(format_.name for format_ in formats)
        if names not in layouts:
            layouts[names] = kernels.slot_layout(files.hidden, files.width, formats)
        found.append(layouts[names])
    return found
