"""Where a placement puts a model's parts, as loading and caches ask for them: devices, and bytes of tiers.

Loading executes the planner's placement as it is and decides nothing by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.families.base import KvRooms
from memory.experts.slots import MIN_SLOTS
from memory.pages.spaces import is_paged
from memory.planner.budget import MemoryBudget
from memory.planner.placement import NOWHERE, OF_SEQUENCES, STAGING, Placement
from memory.planner.placing import plan
from memory.planner.search import largest
from memory.planner.shape import ModelShape
from memory.planner.workspace import lent_bytes, recorded_bytes
from quant.errors import BudgetError

HOST = torch.device("cpu")
READ_BY_EVERY_TOKEN = ("dense", "shared_experts", "head", "look_ups")
NO_LIMIT = 1 << 40  # tokens
LayerBytes = Callable[[int, int, int], int]  # of a layer's KV: (layer, slots, capacity)


@dataclass(frozen=True)
class DensePlaces:
    """Where layers (with their shared experts and KV) and the head are placed, and what is left to experts.

    placement      the planner's
    layers, head   the device of each
    tiers          the tier of each layer
    head_tier      that of the head
    holds_embedding  False if the embedding stays on disk for lack of DRAM
    nbytes         bytes of weights by tier: dense, shared experts, head, embedding
    kv_room        bytes of KV that are kept free, by GPU
    step_room      bytes that are kept free on each GPU for a recorded step's buffers
    lent           bytes of these on each real GPU that a long chunk of a prompt computes with meanwhile
    slots_bytes    bytes by tier of slots for routed experts
    spare          bytes of DRAM that weights may take and the placement does not use
    """

    placement: Placement
    layers: tuple[torch.device, ...]
    head: torch.device
    tiers: tuple[str, ...]
    head_tier: str
    holds_embedding: bool
    nbytes: dict[str, int]
    kv_room: dict[str, int]
    step_room: int
    lent: int
    slots_bytes: dict[str, int]
    spare: int

    def experts(self, tier: str) -> list[int]:
        """How many routed experts a tier holds, of each layer that has any."""
        counts = (self.placement.experts(layer) for layer in range(len(self.tiers)))
        return [held.get(tier, 0) for held in counts if held]

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
    placement = plan(shape, budget.machine_for(shape), budget.limited_workload)
    devices = {"dram": HOST, **{gpu.name: gpu.device for gpu in budget.gpus}}
    nbytes: dict[str, int] = defaultdict(int)
    kv_room = {tier: size for tier, size in placement.kv_bytes().items() if tier not in ("dram", NOWHERE)}
    for tier, parts in placement.allocated().items():
        nbytes[tier] = parts.get("dense", 0)
    _check_dram(placement, shape, path, budget)
    _check_gpus(placement, budget)
    tiers = tuple(placement.tier_of("dense", n) for n in range(len(shape.layers)))
    slots_bytes = {tier: placement.slots_bytes(tier) for tier in devices}
    in_dram = sum(placement.allocated()["dram"].get(part, 0) for part in ("dense", "drafts", "engram"))
    # A part of a model has no head, or no embedding.
    head_tier = placement.tier_of("head", None) if shape.head.nbytes else tiers[-1]
    spare = max(0, budget.dram_bytes - in_dram - slots_bytes["dram"])
    return DensePlaces(
        placement=placement,
        layers=tuple(devices[tier] for tier in tiers),
        head=devices[head_tier],
        tiers=tiers,
        head_tier=head_tier,
        holds_embedding=placement.tier_of("embedding", None) != "nvme",
        nbytes=dict(nbytes),
        kv_room=kv_room,
        step_room=recorded_bytes(shape, budget.workload),
        lent=lent_bytes(shape, budget.workload) if any(not gpu.is_virtual for gpu in budget.gpus) else 0,
        slots_bytes=slots_bytes,
        spare=spare,
    )


def _check_dram(placement: Placement, shape: ModelShape, path: Path, budget: MemoryBudget) -> None:
    """What every token reads must be on GPUs or in DRAM, and experts have slots. Raises BudgetError."""
    missing = [p for p in placement.places if p.tier == NOWHERE]
    required = READ_BY_EVERY_TOKEN if shape.embedding_stays else (*READ_BY_EVERY_TOKEN, "embedding")
    if any(p.kind in required for p in missing):
        needed = sum(p.nbytes for p in placement.places if p.kind in required and p.tier in ("dram", NOWHERE))
        raise BudgetError(
            f"{path}: the weights used by every token need {needed:,} bytes, but the memory budget "
            f"is {budget.dram_bytes:,} bytes; free some memory, raise --dram-budget or use a smaller model"
        )
    if any(p.kind in OF_SEQUENCES for p in missing):
        raise BudgetError(
            f"{path}: there is no room for the KV cache of {placement.workload.sequences} sequence(s) of "
            f"{placement.workload.context:,} tokens; lower --max-model-len, --max-num-seqs or --kv-budget"
        )
    staged = [reserve for reserve in placement.reserves if reserve.name == STAGING]
    if any(reserve.tier == NOWHERE for reserve in staged):
        raise BudgetError(
            f"{path}: beside all else the DRAM budget of {budget.dram_bytes:,} bytes holds fewer than "
            f"{MIN_SLOTS} experts of {shape.slot_nbytes:,} bytes, but at least {MIN_SLOTS} are needed; raise "
            "--dram-budget"
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
