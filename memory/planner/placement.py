"""The placement: which tier holds each part of a model. Pure data; nothing is loaded.

`placing.py` makes it from a model's shape and a hardware profile. Loading allocates what it says, byte for
byte (`engine/families/places.py`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from memory.engram.rows import TableShare

NOWHERE = "nowhere"
HOT_ROWS, STAGING, COPIES, DECODED, PREFIXES, DRAFTS = (
    "hot Engram rows", "expert staging", "copies of experts", "decoded weights", "prefix cache", "drafts",
)  # fmt: skip
SLOTS = (STAGING, COPIES)  # in DRAM these are slots like those of its own experts
# What places and reserves are a part of, as allocation counts it.
PARTS = {
    "embedding": "dense", "shared_experts": "dense", "head": "dense", "look_ups": "dense", DECODED: "dense",
    "kv_states": "kv", HOT_ROWS: "engram", PREFIXES: "prefixes", DRAFTS: "drafts",
}  # fmt: skip
OF_SEQUENCES = ("kv", "kv_states")  # no weights


@dataclass(frozen=True)
class Workload:
    """The workload: `sequences` of up to `context` tokens; prompts in chunks.

    kv_tokens      whose KV has room in all; None: all sequences may be as long as the context
    weights_bytes  of DRAM that weights may take; None: what is left beside all else
    prefix_bytes   of DRAM for states of earlier prompts
    draft_bytes    of DRAM for weights that guess tokens ahead, and their keys
    """

    context: int
    sequences: int = 1
    prefill_chunk: int = 512
    kv_tokens: int | None = None
    weights_bytes: int | None = None
    prefix_bytes: int = 0
    draft_bytes: int = 0


@dataclass(frozen=True)
class Place:
    """One component (or a number of a layer's experts) in one tier.

    kind   `embedding`, `dense`, `shared_experts`, `kv` (pages of the pool), `kv_states` (of sequences, the
           same whatever their length), `head`, `look_ups`, `routed_experts`, `engram`
    count  experts, or rows; 1 for the rest
    """

    component: str
    kind: str
    layer: int | None
    tier: str
    nbytes: int
    count: int
    reason: str


@dataclass(frozen=True)
class Reserve:
    """Bytes of a tier that hold nothing of their own: workspace, staging, copies of hot rows (of a layer)."""

    name: str
    tier: str
    nbytes: int
    reason: str
    layer: int | None = None


@dataclass(frozen=True)
class Placement:
    """The whole placement. Every byte of the model and its KV is in exactly one of `places`.

    tables  what of each layer's Engram table is in DRAM
    """

    model: str
    hardware: str
    workload: Workload
    budgets: dict[str, int]
    places: tuple[Place, ...]
    reserves: tuple[Reserve, ...]
    tables: dict[int, TableShare] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """True if everything has a place."""
        return self.used(NOWHERE) == 0

    def used(self, tier: str) -> int:
        """Bytes planned into a tier."""
        placed = sum(place.nbytes for place in self.places if place.tier == tier)
        return placed + sum(reserve.nbytes for reserve in self.reserves if reserve.tier == tier)

    def tier_of(self, kind: str, layer: int | None) -> str:
        """The tier of a component that is not divided; NOWHERE where the model has none."""
        for place in self.places:
            if place.kind == kind and place.layer == layer:
                return place.tier
        return NOWHERE

    def experts(self, layer: int) -> dict[str, int]:
        """How many of a layer's routed experts each tier holds."""
        return {p.tier: p.count for p in self.places if p.kind == "routed_experts" and p.layer == layer}

    def slots_bytes(self, tier: str) -> int:
        """Bytes of a tier's slots for routed experts: of those that it holds, in DRAM of copies and of what
        is on its way too."""
        held = sum(p.nbytes for p in self.places if p.kind == "routed_experts" and p.tier == tier)
        return held + sum(r.nbytes for r in self.reserves if r.name in SLOTS and r.tier == tier == "dram")

    def kv_bytes(self) -> dict[str, int]:
        """Bytes of KV by tier: of the pool, and of what does not grow."""
        return self._bytes_of(OF_SEQUENCES)

    def pool_bytes(self) -> dict[str, int]:
        """Bytes of the KV pool's pages by tier."""
        return self._bytes_of(("kv",))

    def _bytes_of(self, kinds: tuple[str, ...]) -> dict[str, int]:
        found: dict[str, int] = defaultdict(int)
        for place in self.places:
            if place.kind in kinds:
                found[place.tier] += place.nbytes
        return found

    def allocated(self) -> dict[str, dict[str, int]]:
        """Bytes by tier and part that loading allocates, workspace aside."""
        found: dict[str, dict[str, int]] = {tier: {} for tier in self.budgets if tier != "nvme"}
        for tier, parts in found.items():
            sums: dict[str, int] = defaultdict(int)
            for place in self.places:
                if place.tier == tier and place.kind != "routed_experts":
                    sums[PARTS.get(place.kind, place.kind)] += place.nbytes
            for reserve in self.reserves:
                if reserve.tier == tier and reserve.name in PARTS:
                    sums[PARTS[reserve.name]] += reserve.nbytes
            sums["experts"] = self.slots_bytes(tier)
            parts.update({part: nbytes for part, nbytes in sums.items() if nbytes})
        return found
