"""Places a model on a machine: every component in a tier, from its shape and a hardware profile.

Weights that every token reads go to the GPUs first, then the hottest routed experts (of each layer the same
number, spread over all GPUs), then DRAM, then NVMe. Engram tables go to DRAM if they fit next to the experts,
otherwise to NVMe with a cache of hot rows.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from copy import deepcopy

from memory.engram.rows import TableShare
from memory.experts.slots import MIN_SLOTS
from memory.hardware.profiles import GpuSpec, HardwareProfile
from memory.planner.placement import (
    COPIES,
    DECODED,
    DRAFTS,
    HOT_ROWS,
    NOWHERE,
    OF_SEQUENCES,
    PREFIXES,
    STAGING,
    Placement,
    Reserve,
    Workload,
)
from memory.planner.room import Room
from memory.planner.shape import KvShape, LayerShape, ModelShape, Table
from memory.planner.workspace import lent_bytes, recorded_bytes, workspace_bytes

# A CUDA context with its libraries takes about half a gigabyte on each GPU.
GPU_BASE_BYTES = 600_000_000
# Python, torch and the server, before any weight.
PROCESS_BYTES = 1_000_000_000
# Layers whose experts can be in staging at once: one computed, the next on its way in.
STAGED_LAYERS = 2
# What calling a layer's operations costs more on the CPU than on a GPU; its threads must meet.
CPU_CALLS_S = 1.2e-3
# Of an Engram table on NVMe, the rows worth keeping in DRAM: at most this share of the table, and of DRAM
# where experts compete for it. Rows are asked for before a layer needs them, experts are waited for.
HOT_ROWS_OF_TABLE = 0.10
HOT_ROWS_OF_DRAM = 0.005


def plan(shape: ModelShape, hardware: HardwareProfile, workload: Workload) -> Placement:
    """Place a model on a machine. What finds no room is in tier NOWHERE, and `fits` is False."""
    gpus = [f"vram:{i}" for i in range(len(hardware.gpus))]
    budgets = {tier: gpu.memory_bytes for tier, gpu in zip(gpus, hardware.gpus, strict=True)}
    budgets |= {"dram": hardware.dram_bytes, "nvme": hardware.disk_bytes}
    weights = hardware.dram_bytes if workload.weights_bytes is None else workload.weights_bytes
    room = Room(budgets, weights)
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
    _place_embedding(room, shape, hardware, gpus)
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


def _reserve_workspace(
    room: Room, shape: ModelShape, gpus: tuple[GpuSpec, ...], workload: Workload
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
    room: Room, shape: ModelShape, hardware: HardwareProfile, workload: Workload, gpus: list[str]
) -> Room:
    """What every token reads: to the GPUs the head and what layers fit, or layers alone; the rest to DRAM.

    Of the two the one that keeps more off the CPU is taken, so that a larger GPU never makes a worse plan.
    """
    pages = {gpu: hardware.gpus[int(gpu.partition(":")[2])].page_bytes for gpu in gpus}
    trials: list[Room] = []
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
    room: Room, shape: ModelShape, hardware: HardwareProfile, workload: Workload, gpus: list[str]
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


def _put_head(room: Room, shape: ModelShape, gpus: list[str]) -> None:
    """To the last GPU, which has the last layers."""
    tier = room.first_with(shape.head.nbytes, [*reversed(gpus), "dram"])
    room.put("head", "head", None, tier, shape.head.nbytes, "every token reads it")


def _put_layers(room: Room, shape: ModelShape, workload: Workload, pages: dict[str, int]) -> None:
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


def _place_embedding(room: Room, shape: ModelShape, hardware: HardwareProfile, gpus: list[str]) -> None:
    """One row a token: on disk, where experts need its room and rows can be read there.

    The host looks rows up: where the head has the same matrix on a real GPU, this is another copy of it.
    """
    head = next((place.tier for place in room.places if place.kind == "head"), NOWHERE)
    is_apart = head in gpus and hardware.gpus[int(head.partition(":")[2])].kind != "virtual"
    nbytes = shape.embedding.nbytes + (shape.tied.nbytes if is_apart else 0)
    size = max(1, shape.slot_nbytes)
    experts = sum(layer.experts for layer in shape.layers)
    outside = experts - sum(room.left[gpu] // size for gpu in gpus)
    needed = max(outside, min(MIN_SLOTS, experts)) * size
    has_room = room.for_weights("dram") >= nbytes + needed
    tier = room.first_with(nbytes, ["dram" if has_room or not shape.embedding_stays else "nvme"])
    why = "a token reads one row of it" + (": from the file, experts need the room" if tier == "nvme" else "")
    room.put("embedding", "embedding", None, tier, nbytes, why)


def _place_experts_and_tables(room: Room, shape: ModelShape, gpus: dict[str, float]) -> None:
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


def _reserve_slots(room: Room, shape: ModelShape, most: int, *, needed: int) -> int:
    """Slots in DRAM for experts on their way, `most` at most and `needed` at least; how many there are."""
    slots = min(_slots_on_the_way(shape, most), room.for_weights("dram") // max(1, shape.slot_nbytes))
    slots = max(slots, needed, 0)
    why = "experts on their way from NVMe or between GPUs and DRAM"
    room.reserve(STAGING, "dram", slots * shape.slot_nbytes, why, for_weights=True)
    return slots


def _place_tables(room: Room, shape: ModelShape, tiers: list[str], keeps: int = 0) -> None:
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
    room: Room, shape: ModelShape, left: dict[int, int], tier: str, slots: int, reason: str
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
