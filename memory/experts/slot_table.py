"""A shelf: one arena of expert slots, and which expert lies in which."""

from __future__ import annotations

from dataclasses import dataclass

from memory.tiers import Arena
from memory.transfer import Ticket
from quant.kernels.interface import ExpertWeights, SlotLayout

Key = tuple[int, int]  # (layer, expert)


@dataclass
class Place:
    """An expert's slot in an arena; `ticket` while its bytes are on their way."""

    slot: int
    ticket: Ticket | None = None
    foreseen: bool = False  # brought in by a guess and not used yet

    @property
    def is_moving(self) -> bool:
        """True while the bytes are on their way."""
        return self.ticket is not None and not self.ticket.is_done


class Shelf:
    """One arena, how an expert lies in its slots, and which experts are there, by layer."""

    def __init__(self, arena: Arena, layers: int, layout: SlotLayout) -> None:
        self.arena = arena
        self.layout = layout
        self.tier = arena.tier
        self.by_layer: list[dict[int, Place]] = [{} for _ in range(layers)]
        self.quota = arena.slots / layers  # a layer's fair share
        self._views: dict[int, ExpertWeights] = {}  # by slot: bytes change, where they lie does not

    def weights(self, place: Place) -> ExpertWeights:
        """What lies in `place`."""
        views = self._views.get(place.slot)
        if views is None:
            views = self._views[place.slot] = self.layout.views(self.arena.slot(place.slot))
        return views

    def find(self, key: Key) -> Place | None:
        """Where the expert lies, None where it does not."""
        return self.by_layer[key[0]].get(key[1])

    def put(self, key: Key, place: Place) -> None:
        """Note that the expert lies in `place`."""
        self.by_layer[key[0]][key[1]] = place

    def remove(self, key: Key) -> Place:
        """Forget the expert; whoever asked has its slot now."""
        return self.by_layer[key[0]].pop(key[1])
