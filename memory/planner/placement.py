"""The placement: which tier holds each part of a model, from its shape and a hardware profile.

Pure data; nothing is loaded. Weights that every token reads go to the GPUs first, then the
hottest routed experts (of each layer the same number, spread over all GPUs), then DRAM, then NVMe.
Engram tables go to DRAM if they fit next to the experts, otherwise to NVMe with a cache of hot rows.

Loading allocates what a placement says, byte for byte (`engine/families/places.py`).
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field, replace

from memory.engram.rows import TableShare
from memory.experts.slots import MIN_SLOTS
from memory.experts.store import BLOCK_TOKENS
from memory.hardware.profiles import GpuSpec, HardwareProfile
from memory.planner.shape import KvShape, LayerShape, ModelShape, Table

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
# A CUDA context with its libraries takes about half a gigabyte on each GPU.
GPU_BASE_BYTES = 600_000_000
# Python, torch and the server, before any weight.
PROCESS_BYTES = 1_000_000_000
# Steps pass activations from buffer to buffer, those of attention so many tokens at a time.
ACTIVATION_BUFFERS = 2
# Of a recorded step: its rows at most, how often a token's activations its buffers hold, and latents of a
# part.
RECORDED_ROWS = 16
RECORDED_ACTIVATIONS = 3
RECORDED_LATENTS = 32
RECORDED_SHARES = 64  # programs that share what rows attend to, where that is all, whatever there is of it
# Layers whose experts can be in staging at once: one computed, the next on its way in.
STAGED_LAYERS = 2
# What calling a layer's operations costs more on the CPU than on a GPU; its threads must meet.
CPU_CALLS_S = 1.2e-3
# Of an Engram table on NVMe, the rows worth keeping in DRAM: at most this share of the table, and of DRAM.
HOT_ROWS_OF_TABLE = 0.10
HOT_ROWS_OF_DRAM = 0.05


@dataclass(frozen=True)
class Workload:
    """The workload: `sequences` of up to `context` tokens; prompts in chunks.

    kv_tokens      whose KV has room in all; None: all sequences may be as long as the context
    weights_bytes  of DRAM that weights may take; None: what is left beside all else
    prefix_bytes   of DRAM for states of earlier prompts
    draft_bytes    of DRAM for weights that guess tokens ahead
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


@dataclass
class _Room:
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


def plan(shape: ModelShape, hardware: HardwareProfile, workload: Workload) -> Placement:
    """Place a model on a machine. What finds no room is in tier NOWHERE, and `fits` is False."""
    gpus = [f"vram:{i}" for i in range(len(hardware.gpus))]
    budgets = {tier: gpu.memory_bytes for tier, gpu in zip(gpus, hardware.gpus, strict=True)}
    budgets |= {"dram": hardware.dram_bytes, "nvme": hardware.disk_bytes}
    weights = hardware.dram_bytes if workload.weights_bytes is None else workload.weights_bytes
    room = _Room(budgets, weights)
    room.reserve("process", "dram", PROCESS_BYTES, "Python, torch, the server")
    room.reserve(DRAFTS, "dram", workload.draft_bytes, "guess tokens ahead", for_weights=True)
    room.reserve(PREFIXES, "dram", workload.prefix_bytes, "states that later prompts continue from")
    gpus = _reserve_workspace(room, shape, hardware.gpus, workload)
    room = _place_dense(room, shape, hardware, workload, gpus)
    tier = room.first_with(shape.host_bytes, ["dram"])
    room.put("routers' tables", "look_ups", None, tier, shape.host_bytes, "which experts a token chooses")
    history = workload.sequences * shape.history_bytes
    tier = room.first_with(history, ["dram"], 0)
    room.put("n-grams' last tokens", "kv_states", None, tier, history, "look-ups start on the host")
    _place_embedding(room, shape)
    speeds = {gpu: hardware.gpus[int(gpu.partition(":")[2])].memory_bytes_per_s for gpu in gpus}
    _place_experts_and_tables(room, shape, speeds)
    on_disk = sum(p.nbytes for p in room.places if p.kind not in OF_SEQUENCES and p.tier == "nvme")
    elsewhere = max(0, shape.disk_bytes - on_disk)
    room.reserve("checkpoint", "nvme", elsewhere, "the files of what is loaded into faster tiers")
    return Placement(
        shape.name,
        hardware.name,
        workload,
        budgets,
        tuple(room.places),
        tuple(room.reserves),
        room.tables,
    )


def workspace_bytes(shape: ModelShape, workload: Workload) -> int:
    """Activations and logits of the largest step."""
    tokens = max(workload.prefill_chunk, workload.sequences)
    buffers = ACTIVATION_BUFFERS * min(tokens, BLOCK_TOKENS) * shape.activation_bytes
    held = max(0, tokens - BLOCK_TOKENS) * (shape.held_bytes or ACTIVATION_BUFFERS * shape.activation_bytes)
    return buffers + held + 4 * shape.vocab_size * workload.sequences


def lent_bytes(shape: ModelShape, workload: Workload) -> int:
    """Of a chunk's workspace on a GPU, what its experts' slots lend: all that a short chunk does not need."""
    short = replace(workload, prefill_chunk=min(workload.prefill_chunk, BLOCK_TOKENS))
    return workspace_bytes(shape, workload) - workspace_bytes(shape, short)


def recorded_bytes(shape: ModelShape, workload: Workload) -> int:
    """Buffers of a recorded decode step on a GPU, for all rows that it may have: what a token has in hand,
    logits, a score of each entry that a sequence may have, and attention, in parts of some latents for each
    head, or in as many parts for all rows together as programs share latents that were not chosen; and for
    its share of another GPU's layers, a token's inputs twice, its experts' inner values, and their biases."""
    kv = [layer.kv for layer in shape.layers]
    scores = 6 * workload.context // min((k.seen_ratio for k in kv if k.scan_bytes), default=workload.context)
    attention = max(
        (k.fixed_flops + (k.selected or 0) * k.selected_flops for k in kv), default=0
    )  # x 4 bytes
    in_hand = RECORDED_ACTIVATIONS * shape.activation_bytes + 4 * shape.vocab_size
    inner = shape.top_k * max(layer.expert.parameters // (3 * shape.hidden) for layer in shape.layers)
    share = 4 * (2 * shape.hidden + inner + 2 * shape.top_k)
    whole = max((k.selected_flops for k in kv if k.seen_ratio and k.selected is None), default=0)
    rows = in_hand + scores + attention // RECORDED_LATENTS + share
    return RECORDED_ROWS * rows + RECORDED_SHARES * whole + shape.copied_bytes


def _reserve_workspace(
    room: _Room, shape: ModelShape, gpus: tuple[GpuSpec, ...], workload: Workload
) -> list[str]:
    """Set workspace aside; return the GPUs that have room for it, the others stay unused.

    What a virtual GPU would need of it is host memory, like the GPU itself.
    """
    work = workspace_bytes(shape, workload)
    staging = -(-STAGED_LAYERS * shape.top_k * shape.slot_nbytes // max(1, len(gpus)))
    usable = []
    for number, gpu in enumerate(gpus):
        tier = f"vram:{number}"
        if gpu.kind == "virtual":
            usable.append(tier)
            continue
        needed = work - lent_bytes(shape, workload) + GPU_BASE_BYTES + recorded_bytes(shape, workload)
        if room.left[tier] < needed + staging:
            room.left[tier] = 0
            continue
        usable.append(tier)
        room.reserve("workspace", tier, needed, "activations of a short chunk, logits, a recorded step, CUDA")
        room.reserve(STAGING, tier, staging, f"experts of {STAGED_LAYERS} layers in transit")
    if not any(gpus[int(tier.partition(":")[2])].kind == "cuda" for tier in usable):
        work += recorded_bytes(shape, workload)
        room.reserve("workspace", "dram", work, "activations of a prompt chunk, logits, a recorded step")
    return usable


def _place_dense(
    room: _Room, shape: ModelShape, hardware: HardwareProfile, workload: Workload, gpus: list[str]
) -> _Room:
    """What every token reads: to the GPUs the head and what layers fit, or layers alone; the rest to DRAM.

    Of the two the one that keeps more off the CPU is taken, so that a larger GPU never makes a worse plan.
    """
    pages = {gpu: hardware.gpus[int(gpu.partition(":")[2])].page_bytes for gpu in gpus}
    trials: list[_Room] = []
    for head_first in (True, False):
        trial = deepcopy(room)
        if head_first:
            _put_head(trial, shape, gpus)
        _put_layers(trial, shape, workload, pages)
        if not head_first:
            _put_head(trial, shape, gpus)
        trials.append(trial)
    return max(trials, key=lambda trial: _saved_s(trial, shape, hardware, workload, gpus))


def _saved_s(
    room: _Room, shape: ModelShape, hardware: HardwareProfile, workload: Workload, gpus: list[str]
) -> float:
    """Seconds of the CPU in a step of all sequences for what lies on GPUs instead."""
    tokens = workload.sequences
    saved = 0.0
    for place in room.places:
        if place.tier not in gpus or place.kind not in ("head", "dense"):
            continue
        weights, kv_bytes, kv_flops = shape.head, 0.0, 0.0
        if place.layer is not None:
            layer = shape.layers[place.layer]
            weights = layer.dense + layer.shared
            kv_bytes, kv_flops = layer.kv.read_bytes(workload.context), layer.kv.flops(workload.context)
            saved += CPU_CALLS_S
        saved += max(
            (weights.nbytes + kv_bytes * tokens) / hardware.dram_bytes_per_s,
            tokens * (2 * weights.parameters + kv_flops) / hardware.cpu_matmul_flops,
        )
    return saved


def _put_head(room: _Room, shape: ModelShape, gpus: list[str]) -> None:
    """To the last GPU, which has the last layers."""
    tier = room.first_with(shape.head.nbytes, [*reversed(gpus), "dram"])
    room.put("head", "head", None, tier, shape.head.nbytes, "every token reads it")


def _put_layers(room: _Room, shape: ModelShape, workload: Workload, pages: dict[str, int]) -> None:
    """Consecutive layers to each GPU in proportion to its room, the rest to DRAM.

    pages: of each GPU in use, the bytes of a page.
    """
    gpus = list(pages)

    def pool(layer: LayerShape, tier: str) -> int:
        return _pool_bytes(layer.kv, workload, pages.get(tier, mmap.PAGESIZE))

    def size(layer: LayerShape, tier: str) -> int:
        weights = layer.dense.nbytes + layer.decoded + layer.shared.nbytes
        return weights + workload.sequences * layer.kv.fixed_bytes + pool(layer, tier)

    on_gpus = sum(room.left[gpu] for gpu in gpus)
    needed = sum(size(layer, gpus[0] if gpus else "dram") for layer in shape.layers)
    share = min(1.0, needed / on_gpus) if on_gpus else 1.0
    kept_free = {gpu: room.left[gpu] * (1.0 - share) for gpu in gpus}
    ahead = list(gpus)
    decoded: dict[str, int] = defaultdict(int)
    for n, layer in enumerate(shape.layers):
        while len(ahead) > 1 and room.left[ahead[0]] - size(layer, ahead[0]) / 2 < kept_free[ahead[0]]:
            ahead.pop(0)
        states = workload.sequences * layer.kv.fixed_bytes
        weights = layer.dense.nbytes + layer.decoded + layer.shared.nbytes
        tier = next(
            (
                tier
                for tier in (*ahead, *gpus, "dram")
                if room.first_with(size(layer, tier), [tier], weights) == tier
            ),
            NOWHERE,
        )
        why = "every token reads it" + ("; the GPUs are full" if gpus and tier == "dram" else "")
        room.put(f"dense, layer {n}", "dense", n, tier, layer.dense.nbytes, why)
        room.put(f"shared experts, layer {n}", "shared_experts", n, tier, layer.shared.nbytes, why)
        room.put(f"KV, layer {n}", "kv", n, tier, pool(layer, tier), "on its layer's device")
        why = "on its layer's device; it does not grow"
        room.put(f"states of sequences, layer {n}", "kv_states", n, tier, states, why)
        room.take(tier, layer.decoded)  # now, so that the next layer finds what is left
        decoded[tier] += layer.decoded
    room.reserves += [
        Reserve(DECODED, tier, nbytes, "held as plain numbers, beside what the file has of them")
        for tier, nbytes in decoded.items()
        if nbytes
    ]


def _pool_bytes(kv: KvShape, workload: Workload, page_bytes: int) -> int:
    """Of a layer, pages for all sequences."""
    whole = workload.sequences * workload.context
    tokens = whole if workload.kv_tokens is None else workload.kv_tokens
    return kv.pool_bytes(tokens, workload.sequences, workload.context, page_bytes)


def embedding_fits(shape: ModelShape, dram_bytes: int) -> bool:
    """True if this many bytes of DRAM hold the embedding and the experts that pass through from NVMe."""
    return dram_bytes >= shape.embedding.nbytes + STAGED_LAYERS * shape.top_k * shape.slot_nbytes


def _place_embedding(room: _Room, shape: ModelShape) -> None:
    """One row a token: on disk, where DRAM has no room for all of it."""
    tier = "dram" if embedding_fits(shape, room.for_weights("dram")) else "nvme"
    tier = room.first_with(shape.embedding.nbytes, [tier])
    why = "a token reads one row of it" + (", from the file" if tier == "nvme" else "")
    room.put("embedding", "embedding", None, tier, shape.embedding.nbytes, why)


def _place_experts_and_tables(room: _Room, shape: ModelShape, gpus: dict[str, float]) -> None:
    """Experts, hottest first, to GPUs, DRAM and NVMe; Engram tables where there is room beside them.

    gpus: those in use, with the bandwidth of their memory.
    """
    left = {n: layer.experts for n, layer in enumerate(shape.layers) if layer.experts}
    total, size = sum(left.values()), max(1, shape.slot_nbytes)
    room_for = {gpu: room.left[gpu] // size for gpu in gpus}
    for gpu, slots in _shares(room_for, total, gpus).items():
        _put_experts(room, shape, left, gpu, slots, "hottest: read from the GPU's own memory")
    outside = sum(left.values())
    are_all_in_dram = outside * size <= room.for_weights("dram")
    if are_all_in_dram:
        _put_experts(room, shape, left, "dram", outside, "computed by the CPU in place, or fetched")
        _reserve_slots(room, shape, total - outside, needed=min(MIN_SLOTS, total) - outside)
        _place_tables(room, shape, ["dram", "nvme"])
        copies = total - outside - _slots_on_the_way(shape, total - outside)
        if copies and copies * size <= room.for_weights("dram"):
            why = "of what GPUs hold: nothing has to come back for what goes there"
            room.reserve(COPIES, "dram", copies * size, why, for_weights=True)
        return
    _place_tables(room, shape, ["nvme"], keeps=min(MIN_SLOTS, total) * size)
    slots = room.for_weights("dram") // size
    on_the_way = _reserve_slots(room, shape, min(slots, total), needed=min(MIN_SLOTS, total))
    why = "computed by the CPU in place, or fetched"
    _put_experts(room, shape, left, "dram", max(0, slots - on_the_way), why)
    on_disk = room.left["nvme"] // max(1, shape.expert_nbytes)
    _put_experts(room, shape, left, "nvme", on_disk, "coldest: read when a token chooses them")
    for n, count in left.items():
        nbytes = count * shape.layers[n].expert.nbytes
        room.put(f"routed experts, layer {n}", "routed_experts", n, NOWHERE, nbytes, "", count)


def _slots_on_the_way(shape: ModelShape, most: int) -> int:
    return min(STAGED_LAYERS * shape.top_k, most)


def _reserve_slots(room: _Room, shape: ModelShape, most: int, *, needed: int) -> int:
    """Slots in DRAM for experts on their way, `most` at most and `needed` at least; how many there are."""
    slots = min(_slots_on_the_way(shape, most), room.for_weights("dram") // max(1, shape.slot_nbytes))
    slots = max(slots, needed, 0)
    why = "experts on their way from NVMe or between GPUs and DRAM"
    room.reserve(STAGING, "dram", slots * shape.slot_nbytes, why, for_weights=True)
    return slots


def _place_tables(room: _Room, shape: ModelShape, tiers: list[str], keeps: int = 0) -> None:
    """Engram tables to the first of these tiers that has room, and hot rows of those on NVMe to DRAM, which
    keeps so many bytes free for experts."""
    tables = {n: layer.table for n, layer in enumerate(shape.layers) if layer.table}
    cold = {}
    for n, table in tables.items():
        tier = room.first_with(table.nbytes, tiers)
        why = "DRAM has room; rows go to the GPUs" if tier == "dram" else "a token reads a few rows of it"
        room.put(f"Engram table, layer {n}", "engram", n, tier, table.nbytes, why, table.rows)
        if tier == "dram":
            room.tables[n] = _share(table, table.nbytes)
        else:
            cold[n] = table
    nbytes = sum(table.nbytes for table in cold.values())
    free = max(0, room.for_weights("dram") - keeps)
    most = free if "dram" in tiers else int(HOT_ROWS_OF_DRAM * free)
    hot = min(HOT_ROWS_OF_TABLE * nbytes, most)
    for n, table in cold.items():
        share = room.tables[n] = _share(table, int(hot * table.nbytes // nbytes))
        room.reserve(
            HOT_ROWS, "dram", share.nbytes, "cached copies; the tables are on NVMe", for_weights=True, layer=n
        )


def _share(table: Table, budget_bytes: int) -> TableShare:
    code_bytes = table.row_bytes - table.scale_bytes
    return TableShare.within(budget_bytes, table.rows, code_bytes, table.scale_bytes)


def _shares(room_for: dict[str, int], wanted: int, speeds: dict[str, float]) -> dict[str, int]:
    """How many experts each GPU takes: all it has room for, or by speed where there is room for all."""
    shares: dict[str, int] = {}
    waiting = dict(room_for)
    while waiting:
        speed = sum(speeds[gpu] for gpu in waiting)
        fair = {gpu: -int(-wanted * speeds[gpu] // speed) for gpu in waiting}
        full = [gpu for gpu in waiting if room_for[gpu] <= fair[gpu]] or list(waiting)
        for gpu in full:
            shares[gpu] = min(room_for[gpu], fair[gpu], wanted)
            wanted -= shares[gpu]
            del waiting[gpu]
    return {gpu: shares[gpu] for gpu in room_for}


def _put_experts(
    room: _Room, shape: ModelShape, left: dict[int, int], tier: str, slots: int, reason: str
) -> None:
    """Put up to `slots` experts into a tier, of each layer as equally many as possible."""
    taken = dict.fromkeys(left, 0)
    while slots > 0 and any(left.values()):
        waiting = sorted((n for n in left if left[n]), key=lambda n: -left[n])
        each = max(1, slots // len(waiting))
        for n in waiting:
            count = min(each, left[n], slots)
            taken[n] += count
            left[n] -= count
            slots -= count
    for n, count in taken.items():
        of_one = shape.layers[n].expert.nbytes if tier == "nvme" else shape.slot_bytes
        nbytes = count * (of_one or shape.layers[n].expert.nbytes)
        room.put(f"routed experts, layer {n}", "routed_experts", n, tier, nbytes, reason, count)
