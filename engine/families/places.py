"""Placement of the weights that every token reads, on GPUs or in DRAM: as planned, within the budgets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cache.pages import largest
from engine.families.base import KvRooms
from memory.pages.spaces import is_paged
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Placement, embedding_fits, lent_bytes, plan, recorded_bytes
from memory.planner.shape import ModelShape
from quant.errors import BudgetError

HOST = torch.device("cpu")
NO_LIMIT = 1 << 40  # tokens
LayerBytes = Callable[[int, int, int], int]  # of a layer's KV: (layer, slots, capacity)


@dataclass(frozen=True)
class DensePlaces:
    """Where layers (with their shared experts and KV) and the head are placed.

    layers, head   the device of each
    tiers          the tier of each layer
    head_tier      that of the head
    holds_embedding  False if the embedding stays on disk for lack of DRAM
    nbytes         bytes of weights by tier: dense, shared experts, head, embedding
    kv_room        bytes of KV that are kept free, by GPU
    step_room      bytes that are kept free on each GPU for a recorded step's buffers
    lent           bytes of these on each real GPU that a long chunk of a prompt computes with meanwhile
    left           bytes by tier for routed experts (in DRAM, for Engram tables too)
    experts_bytes, tables_bytes  of all routed experts, and of all Engram tables
    """

    layers: tuple[torch.device, ...]
    head: torch.device
    tiers: tuple[str, ...]
    head_tier: str
    holds_embedding: bool
    nbytes: dict[str, int]
    kv_room: dict[str, int]
    step_room: int
    lent: int
    left: dict[str, int]
    experts_bytes: int
    tables_bytes: int

    def check_kv(self, slots: int, capacity: int, layer_bytes: LayerBytes) -> None:
        """Raises BudgetError where a GPU's part of a cache is more than was kept free there when loading: one
        whole sequence and what the others have at their beginning; all whole, where nothing grows."""
        for tier, room in self.kv_room.items():
            one = self._of_tier(tier, capacity, layer_bytes)
            others = one if not self._grows(tier) else self._of_tier(tier, 0, layer_bytes)
            if (needed := one + (slots - 1) * others) > room:
                which = " of" if others == one else ", one of them of"
                raise BudgetError(
                    f"{tier}: the KV cache of {slots} sequences{which} {capacity} tokens needs "
                    f"{needed / 1e6:,.1f} MB, but only {room / 1e6:,.1f} MB was reserved for it"
                )

    def kv_rooms(self, slots: int, layer_bytes: LayerBytes) -> KvRooms:
        """What was kept free for the KV of so many sequences."""
        in_all, longest, by_device = NO_LIMIT, NO_LIMIT, {}
        for tier, room in self.kv_room.items():
            others = (slots - 1) * self._of_tier(tier, 0, layer_bytes)
            device = self.layers[self.tiers.index(tier)]

            def fits(tokens: int, tier: str = tier, room: int = room - others) -> bool:
                return self._of_tier(tier, tokens, layer_bytes) <= room

            tokens = largest(fits, NO_LIMIT)
            in_all = min(in_all, tokens)
            longest = min(longest, tokens if self._grows(tier) else tokens // slots)
            if device != HOST:
                by_device[device] = max(0, room - others - self._of_tier(tier, 0, layer_bytes))
        if in_all == NO_LIMIT:
            return KvRooms()
        return KvRooms(in_all, longest, by_device)

    def _of_tier(self, tier: str, tokens: int, layer_bytes: LayerBytes) -> int:
        """Bytes of a sequence's KV in a tier."""
        return sum(layer_bytes(n, 1, tokens) for n, at in enumerate(self.tiers) if at == tier)

    def _grows(self, tier: str) -> bool:
        return tier in self.tiers and is_paged(self.layers[self.tiers.index(tier)])


def place(shape: ModelShape, path: Path, budget: MemoryBudget) -> DensePlaces:
    """Places for the model at `path` within `budget`.

    Raises BudgetError where what every token reads does not fit.
    """
    placement = plan(shape, budget.profile, budget.workload)
    devices = {"dram": HOST, **{gpu.name: gpu.device for gpu in budget.gpus}}
    budgets = {"dram": budget.dram_bytes, **{gpu.name: gpu.budget_bytes for gpu in budget.gpus}}
    nbytes: dict[str, int] = defaultdict(int)
    kv_room: dict[str, int] = defaultdict(int)
    for place in placement.places:
        if place.kind in ("dense", "shared_experts", "head"):
            nbytes[place.tier] += place.nbytes
        elif place.kind == "kv" and place.tier != "dram":
            kv_room[place.tier] += place.nbytes
    holds_embedding = embedding_fits(shape, budget.dram_bytes - nbytes["dram"])
    if holds_embedding:
        nbytes["dram"] += shape.embedding.nbytes
    if nbytes["dram"] > budget.dram_bytes:
        raise BudgetError(
            f"{path}: the weights used by every token need {nbytes['dram']:,} bytes, but the memory budget "
            f"is {budget.dram_bytes:,} bytes; free some memory, raise --dram-budget or use a smaller model"
        )
    _check_gpus(placement, budget)
    reserved: dict[str, int] = defaultdict(int)
    for reserve in placement.reserves:
        reserved[reserve.tier] += reserve.nbytes if reserve.tier.startswith("vram") else 0
    tiers = tuple(placement.tier_of("dense", n) for n in range(len(shape.layers)))
    return DensePlaces(
        layers=tuple(devices[tier] for tier in tiers),
        head=devices[placement.tier_of("head", None)],
        tiers=tiers,
        head_tier=placement.tier_of("head", None),
        holds_embedding=holds_embedding,
        nbytes=dict(nbytes),
        kv_room=dict(kv_room),
        step_room=recorded_bytes(shape, budget.workload),
        lent=lent_bytes(shape, budget.workload) if any(not gpu.is_virtual for gpu in budget.gpus) else 0,
        left={
            tier: max(0, allowed - nbytes[tier] - kv_room[tier] - reserved[tier])
            for tier, allowed in budgets.items()
        },
        experts_bytes=sum(layer.experts * layer.expert.nbytes for layer in shape.layers),
        tables_bytes=sum(layer.table.nbytes for layer in shape.layers if layer.table is not None),
    )


def _check_gpus(placement: Placement, budget: MemoryBudget) -> None:
    """A real GPU without room for its work space would fail while serving. Raises BudgetError."""
    planned = {reserve.tier for reserve in placement.reserves}
    for gpu in budget.gpus:
        if not gpu.is_virtual and gpu.name not in planned:
            raise BudgetError(
                f"{gpu.name}: {gpu.budget_bytes / 1e9:.1f} GB is too little for CUDA, activations and "
                "experts in transit; raise this GPU's budget or leave it out"
            )
