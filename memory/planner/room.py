"""What is left of each tier while a model is placed."""

from __future__ import annotations

from dataclasses import dataclass, field

from memory.engram.rows import TableShare
from memory.planner.placement import NOWHERE, OF_SEQUENCES, Place, Reserve


@dataclass
class Room:
    """The remaining bytes of each tier during placement; in DRAM, so many of them for weights."""

    budgets: dict[str, int]
    weights_left: int
    left: dict[str, int] = field(init=False)
    places: list[Place] = field(default_factory=list)
    reserves: list[Reserve] = field(default_factory=list)
    tables: dict[int, TableShare] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = dict(self.budgets)

    def for_weights(self, tier: str) -> int:
        """Bytes of a tier that weights may take."""
        return min(self.left[tier], self.weights_left) if tier == "dram" else self.left[tier]

    def take(self, tier: str, nbytes: int, *, for_weights: bool = True) -> None:
        """Take bytes from a tier."""
        if tier == NOWHERE:
            return
        self.left[tier] -= nbytes
        if tier == "dram" and for_weights:
            self.weights_left -= nbytes

    def reserve(
        self,
        name: str,
        tier: str,
        nbytes: int,
        reason: str,
        *,
        for_weights: bool = False,
        layer: int | None = None,
    ) -> None:
        """Take bytes from a tier; NOWHERE if it does not have enough left."""
        if not nbytes:
            return
        tier = self.first_with(nbytes, [tier], nbytes if for_weights else 0)
        self.take(tier, nbytes, for_weights=for_weights)
        self.reserves.append(Reserve(name, tier, nbytes, reason, layer))

    def put(
        self,
        component: str,
        kind: str,
        layer: int | None,
        tier: str,
        nbytes: int,
        reason: str,
        count: int = 1,
    ) -> None:
        """Place a component whose tier has been found."""
        if not nbytes:
            return
        self.take(tier, nbytes, for_weights=kind not in OF_SEQUENCES)
        reason = "it fits in no tier" if tier == NOWHERE else reason
        self.places.append(Place(component, kind, layer, tier, nbytes, count, reason))

    def first_with(self, nbytes: int, tiers: list[str], weights: int | None = None) -> str:
        """The first of these tiers that has so many bytes left, `weights` of them (or all) for weights."""
        weights = nbytes if weights is None else weights
        return next(
            (tier for tier in tiers if self.left[tier] >= nbytes and self.for_weights(tier) >= weights),
            NOWHERE,
        )
