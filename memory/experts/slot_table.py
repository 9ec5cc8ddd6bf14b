"""A slot table: one arena of expert slots, and which expert each holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memory.tiers import Arena
from memory.transfer import Ticket
from quant.kernels.interface import ExpertWeights, SlotLayout

Key = tuple[int, int]  # (layer, expert)


@dataclass
class SlotEntry:
    """An expert's slot in an arena; `ticket` while its bytes are in flight."""

    slot: int
    ticket: Ticket | None = None
    is_unused_prefetch: bool = False  # prefetched, and not used yet

    @property
    def is_moving(self) -> bool:
        """True while the bytes are in flight."""
        return self.ticket is not None and not self.ticket.is_done


class Observer(Protocol):
    """Is told which experts get and lose a slot."""

    def put(self, key: Key, entry: SlotEntry) -> None:
        """The expert has the entry's slot."""
        ...

    def remove(self, key: Key) -> None:
        """The expert has none."""
        ...


class SlotTable:
    """One arena of slots that any layer's experts fit, their layouts and the experts it holds, by layer."""

    def __init__(self, arena: Arena, layouts: Sequence[SlotLayout]) -> None:
        layers = len(layouts)
        self.arena = arena
        self.layouts = layouts
        self.tier = arena.tier
        self.by_layer: list[dict[int, SlotEntry]] = [{} for _ in range(layers)]
        self.quota = arena.slots / layers  # a layer's fair share
        self.observer: Observer | None = None
        # by layout and slot: bytes change, their addresses do not
        self._views: dict[tuple[int, int], ExpertWeights] = {}

    def weights(self, layer: int, entry: SlotEntry) -> ExpertWeights:
        """The contents of the slot of an entry of `layer`."""
        layout = self.layouts[layer]
        at = id(layout), entry.slot
        views = self._views.get(at)
        if views is None:
            views = self._views[at] = layout.views(self.arena.slot(entry.slot))
        return views

    def forget_lent(self) -> None:
        """No view keeps the memory of slots that are about to be lent."""
        kept = self.arena.kept
        self._views = {at: views for at, views in self._views.items() if at[1] < kept}

    def find(self, key: Key) -> SlotEntry | None:
        """The expert's entry, None if it is not held."""
        return self.by_layer[key[0]].get(key[1])

    def put(self, key: Key, entry: SlotEntry) -> None:
        """Record that the entry's slot holds the expert."""
        self.by_layer[key[0]][key[1]] = entry
        if self.observer is not None:
            self.observer.put(key, entry)

    def remove(self, key: Key) -> SlotEntry:
        """Remove the expert without freeing its slot, which passes to the caller."""
        if self.observer is not None:
            self.observer.remove(key)
        return self.by_layer[key[0]].pop(key[1])

    def drop(self, key: Key) -> None:
        """Remove the expert and free its slot."""
        self.arena.give_back(self.remove(key).slot)

    def count(self, layer: int) -> int:
        """Experts of `layer` held here."""
        return len(self.by_layer[layer])
