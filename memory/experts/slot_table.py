"""A slot table: one arena of expert slots, and which expert lies in which."""

from __future__ import annotations

from dataclasses import dataclass

from memory.tiers import Arena
from memory.transfer import Ticket
from quant.kernels.interface import ExpertWeights, SlotLayout

Key = tuple[int, int]  # (layer, expert)


@dataclass
class SlotEntry:
    """An expert's slot in an arena; `ticket` while its bytes are on their way."""

    slot: int
    ticket: Ticket | None = None
    is_unused_prefetch: bool = False  # brought in by a guess, and not used yet

    @property
    def is_moving(self) -> bool:
        """True while the bytes are on their way."""
        return self.ticket is not None and not self.ticket.is_done


class SlotTable:
    """One arena, how an expert lies in its slots, and which experts are there, by layer."""

    def __init__(self, arena: Arena, layers: int, layout: SlotLayout) -> None:
        self.arena = arena
        self.layout = layout
        self.tier = arena.tier
        self.by_layer: list[dict[int, SlotEntry]] = [{} for _ in range(layers)]
        self.quota = arena.slots / layers  # a layer's fair share
        self._views: dict[int, ExpertWeights] = {}  # by slot: bytes change, where they lie does not

    def weights(self, entry: SlotEntry) -> ExpertWeights:
        """What lies in the entry's slot."""
        views = self._views.get(entry.slot)
        if views is None:
            views = self._views[entry.slot] = self.layout.views(self.arena.slot(entry.slot))
        return views

    def find(self, key: Key) -> SlotEntry | None:
        """Where the expert lies, None where it does not."""
        return self.by_layer[key[0]].get(key[1])

    def put(self, key: Key, entry: SlotEntry) -> None:
        """Note that the expert lies in the entry's slot."""
        self.by_layer[key[0]][key[1]] = entry

    def remove(self, key: Key) -> SlotEntry:
        """Forget the expert; whoever asked has its slot now."""
        return self.by_layer[key[0]].pop(key[1])

    def drop(self, key: Key) -> None:
        """Forget the expert and free its slot."""
        self.arena.give_back(self.remove(key).slot)

    def count(self, layer: int) -> int:
        """Experts of `layer` that lie here."""
        return len(self.by_layer[layer])
