"""The cost of a step: bytes per tier, overlap of transfers and arithmetic, and the bottleneck.

The model is one page: docs/planner.md. A layer's dense part runs on the GPU (or CPU) that holds it;
then its routed experts run on their tiers, all at once: those in VRAM on the GPUs, those in DRAM split
between the CPU and the links so that both finish together, those on NVMe after they were read. The step
is the sum over layers, plus the head. Nothing here is measured at run time and nothing is fitted to a
machine: `Efficiency` has the few constants, each with its source.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from memory.hardware.profiles import HardwareProfile
from memory.planner.launches import SHARE, beside
from memory.planner.placement import STAGING, Placement
from memory.planner.routing import Routing, any_used, distinct
from memory.planner.shape import LayerShape, ModelShape, Table

# Steps of more sequences, and prompts, are not recorded.
MAX_RECORDED_ROWS = 16

# An expert from NVMe is written to DRAM by the disk, read and written when it is rearranged, and read again.
CROSSINGS = 3
BLOCK_BYTES = 4096  # of a random read

VRAM, GPU, DRAM, CPU, LINK, DISK, LATENCY = (
    "VRAM bandwidth", "GPU arithmetic", "DRAM bandwidth", "CPU arithmetic", "PCIe links", "disk", "latency",
)  # fmt: skip


@dataclass(frozen=True)
class Efficiency:
    """What of a machine's rates programs reach; sources in docs/planner.md.

    vram_share          of a GPU's data-sheet bandwidth, in matrix-vector products
    gpu_flops_share     of its dense bf16 arithmetic, on prompts
    expert_share        of the DRAM read rate, in the CPU's expert kernels (unless the profile says)
    bus_share           of the DRAM read rate, when CPU and links read at once
    gpu_layer_s         starting a layer's operations on a GPU one by one from Python
    host_layer_s        the same on the CPU: calls, and threads that meet
    launch_s            one launch of a recorded step on a GPU
    operation_s         one operation of a recorded step on the CPU, beyond reading weights
    guessed_share       of a layer's missing experts that are asked for before its router says so
    rearranged_per_core bytes a second that a core brings from file order into the kernels' order (unless the
                        profile says)
    rearranged_share    of the profile's rate, a quiet core's, what is left beside other work
    round_trip_s        GPU to CPU and back, in a layer that needs experts outside VRAM
    hand_over_s         the same through a mailbox, in a recorded step
    gpu_hop_s           GPU to GPU and back, in a layer whose experts lie on several
    exchange_s          the same through a mailbox, in a recorded step, beside what crosses the links
    disk_read_s         a random read alone
    """

    vram_share: float = 0.8
    gpu_flops_share: float = 0.5
    expert_share: float = 0.8
    bus_share: float = 0.82
    gpu_layer_s: float = 2.2e-3
    host_layer_s: float = 1.1e-3
    launch_s: float = 5e-6
    operation_s: float = 5e-6
    guessed_share: float = 0.9
    rearranged_per_core: float = 4e9
    rearranged_share: float = 0.7
    round_trip_s: float = 100e-6
    hand_over_s: float = 30e-6
    gpu_hop_s: float = 52e-6
    exchange_s: float = 10e-6
    disk_read_s: float = 100e-6


@dataclass
class StepCost:
    """A step's time and bytes.

    tokens        tokens the step produces (decode) or takes in (prefill)
    seconds       its duration, by the resource that was busy longest at each point
    nbytes        bytes read from each tier, or moved over each link, by its name
    hit_rates     share of the routed picks found in VRAM, DRAM and on NVMe
    disk_idle_s   since the last router, in which the disk could read what the next layer is guessed to need
    """

    tokens: int
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    nbytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    hit_rates: dict[str, float] = field(default_factory=dict)

    disk_idle_s: float = 0.0

    def add(self, part: StepCost, share: float) -> None:
        """Add a part of the step, of which a share is done."""
        for resource, seconds in part.seconds.items():
            self.seconds[resource] += share * seconds
        for tier, nbytes in part.nbytes.items():
            self.nbytes[tier] += share * nbytes
        self.disk_idle_s = part.disk_idle_s

    @property
    def total_s(self) -> float:
        """Duration of the step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of a run of such steps."""
        return self.tokens / self.total_s

    @property
    def bound(self) -> str:
        """The resource that takes most of the time."""
        return max(self.seconds, key=lambda resource: self.seconds[resource])


class CostModel:
    """Predicts steps of a placed model on a machine under a routing."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: HardwareProfile,
        placement: Placement,
        routing: Routing,
        efficiency: Efficiency | None = None,
    ) -> None:
        self.shape = shape
        self.hardware = hardware
        self.placement = placement
        self.routing = routing
        self.efficiency = efficiency or Efficiency()
        e = self.efficiency
        bus = hardware.dram_bytes_per_s * e.bus_share
        self._cpu_rate = min(
            hardware.expert_bytes_per_s or hardware.dram_bytes_per_s * e.expert_share,
            hardware.dram_bytes_per_s,
        )
        self._bus_rate = max(bus, self._cpu_rate)
        self._dense_flops = hardware.cpu_fp8_flops or hardware.cpu_matmul_flops
        per_core = hardware.rearranged_per_core
        per_core = per_core * e.rearranged_share if per_core else e.rearranged_per_core
        self._rearranged_per_s = per_core * hardware.cores
        self._experts = [placement.experts(n) for n in range(len(shape.layers))]
        self._passing = _passing(shape, placement)
        self._tiers = [placement.tier_of("dense", n) for n in range(len(shape.layers))]
        self._embedding_on_disk = sum(
            p.nbytes for p in placement.places if p.kind == "embedding" and p.tier == "nvme"
        )
        self._table_tiers = [placement.tier_of("engram", n) for n in range(len(shape.layers))]
        self._hot_rows_bytes = sum(r.nbytes for r in placement.reserves if r.name == "hot Engram rows")
        self._cold_tables_bytes = sum(
            p.nbytes for p in placement.places if p.kind == "engram" and p.tier == "nvme"
        )

    def decode(self, sequences: int, held: int) -> StepCost:
        """One token for each of `sequences` sequences that hold `held` tokens."""
        return self._step(sequences, sequences, held)

    def _step(self, tokens: int, sequences: int, held: int) -> StepCost:
        """Each sequence reads its KV once, whatever its tokens, and wants logits of one of them."""
        cost = StepCost(tokens)
        hits: dict[str, float] = defaultdict(float)
        self._embedding(cost, tokens)
        is_prefetched = True  # the first layer's experts are guessed from the embedding
        for n, layer in enumerate(self.shape.layers):
            part = StepCost(tokens, disk_idle_s=cost.disk_idle_s)
            if layer.table is not None:
                self._rows(cost, n, layer.table, tokens)
            self._dense(part, n, layer, tokens, sequences, held)
            if not is_prefetched:
                part.disk_idle_s = 0.0
            is_prefetched = layer.experts > 0
            if layer.experts:
                self._routed(part, hits, n, layer, tokens)
            cost.add(part, 1.0)
        head_tier = self.placement.tier_of("head", None)
        time, resource = self._on(
            head_tier, self.shape.head.nbytes, 2 * self.shape.head.parameters * sequences
        )
        cost.seconds[resource] += time
        cost.nbytes[head_tier] += self.shape.head.nbytes
        picks = sum(hits.values())
        cost.hit_rates = {tier: hits[tier] / picks if picks else 0.0 for tier in ("vram", "dram", "nvme")}
        cost.seconds = {resource: time for resource, time in cost.seconds.items() if time > 0}
        cost.nbytes = {tier: nbytes for tier, nbytes in cost.nbytes.items() if nbytes > 0}
        return cost

    def _on(
        self, tier: str, nbytes: float, flops: float, cpu_flops: float | None = None
    ) -> tuple[float, str]:
        """Time to read bytes of a tier and compute with them beside it, and what it is bound by."""
        e = self.efficiency
        if tier.startswith("vram"):
            gpu = self.hardware.gpus[int(tier.partition(":")[2])]
            if gpu.kind == "cuda":
                read = nbytes / (gpu.memory_bytes_per_s * e.vram_share)
                compute = flops / (gpu.matmul_flops * e.gpu_flops_share)
                return max(read, compute), VRAM if read >= compute else GPU
        read, compute = nbytes / self._cpu_rate, flops / (cpu_flops or self.hardware.cpu_matmul_flops)
        return max(read, compute), DRAM if read >= compute else CPU

    def _is_real_gpu(self, tier: str) -> bool:
        return tier.startswith("vram") and self.hardware.gpus[int(tier.partition(":")[2])].kind == "cuda"

    def _dense(
        self, cost: StepCost, n: int, layer: LayerShape, tokens: int, sequences: int, held: int
    ) -> None:
        """Attention, router, shared experts, and fixed costs; the disk reads ahead meanwhile."""
        before = cost.total_s
        tier, is_beside = self._tiers[n], self._is_shared_beside(n, layer, tokens)
        weights = layer.dense if is_beside else layer.dense + layer.shared
        nbytes = weights.nbytes + layer.kv.read_bytes(held) * sequences
        flops = tokens * (2 * weights.parameters + layer.kv.flops(held))
        time, resource = self._on(tier, nbytes, flops, self._dense_flops)
        cost.seconds[resource] += time
        cost.nbytes[tier] += nbytes
        cost.seconds[LATENCY] += self._starting_s(layer, tokens, tier, _beside(layer) if is_beside else 0)
        cost.disk_idle_s += cost.total_s - before

    def _is_shared_beside(self, n: int, layer: LayerShape, tokens: int) -> bool:
        """Whether the shared expert is computed while others compute the experts that a GPU lacks: a recorded
        step does so."""
        return layer.experts > 0 and self._is_real_gpu(self._tiers[n]) and _is_recorded(layer, tokens)

    def _starting_s(self, layer: LayerShape, tokens: int, tier: str, less: int) -> float:
        """What starting a layer's operations takes, without so many launches: recorded, or one by one."""
        e = self.efficiency
        if not self._is_real_gpu(tier):
            return layer.operations * e.operation_s if tokens <= MAX_RECORDED_ROWS else e.host_layer_s
        if layer.launches is not None and _is_recorded(layer, tokens):
            return (layer.launches - less) * e.launch_s
        return e.gpu_layer_s

    def _embedding(self, cost: StepCost, tokens: int) -> None:
        """Rows of an embedding that stays on disk: asked for at once, and nothing begins before they are
        there."""
        if not self._embedding_on_disk:
            return
        row_bytes = self._embedding_on_disk / self.shape.vocab_size
        reads, nbytes = tokens * max(1.0, row_bytes / BLOCK_BYTES), tokens * row_bytes
        together_s = max(reads / self.hardware.disk_reads_per_s, nbytes / self.hardware.disk_bytes_per_s)
        cost.seconds[DISK] += self.efficiency.disk_read_s + together_s
        cost.nbytes["nvme"] += nbytes

    def _rows(self, cost: StepCost, n: int, table: Table, tokens: int) -> None:
        """Engram rows: fetched from the step's start on, so only what layers 0..n-1 do not hide counts."""
        tier, rows = self._table_tiers[n], tokens * table.rows_per_token
        cost.nbytes[tier] += rows * table.row_bytes
        held = self.placement.tables.get(n)
        reads = 2 if table.scale_bytes and held is not None and not held.holds_scales else 1  # of a row
        cached = self._hot_rows_bytes / self._cold_tables_bytes if self._cold_tables_bytes else 1.0
        missed = reads * rows * (1.0 - cached) if tier == "nvme" else 0.0
        from_disk = missed / self.hardware.disk_reads_per_s
        from_dram = rows / self.hardware.dram_rows_per_s
        exposed = max(0.0, max(from_disk, from_dram) - cost.total_s)
        cost.seconds[DISK if from_disk > from_dram else DRAM] += exposed

    def _routed(self, cost: StepCost, hits: dict[str, float], n: int, layer: LayerShape, tokens: int) -> None:
        """The layer's routed experts on all tiers, in parallel."""
        e, held = self.efficiency, self._experts[n]
        chances = self.routing.picks(n, layer.experts, self.shape.top_k)
        size, flops = layer.expert.nbytes, 2 * layer.expert.parameters
        gpus = {tier: count for tier, count in held.items() if tier.startswith("vram")}
        in_vram = sum(gpus.values())
        in_dram = in_vram + held.get("dram", 0) + self._passing[n]
        hot, warm, cold = chances[:in_vram], chances[in_vram:in_dram], chances[in_dram:]
        for tier, part in (("vram", hot), ("dram", warm), ("nvme", cold)):
            hits[tier] += tokens * float(part.sum())

        is_recorded = self._is_real_gpu(self._tiers[n]) and _is_recorded(layer, tokens)
        cpu_s, gpu_s, gpu_bound = 0.0, 0.0, VRAM
        for tier, count in gpus.items():
            share = count / in_vram
            nbytes = size * distinct(hot, tokens) * share
            time, resource = self._on(tier, nbytes, flops * tokens * float(hot.sum()) * share)
            cost.nbytes[tier] += nbytes
            if not self._is_real_gpu(tier):
                cpu_s += time
                continue
            if is_recorded and tier == self._tiers[n]:
                time += self._beside_s(cost, tier, layer, tokens)
            elif is_recorded:
                time += self._exchange(cost, self._tiers[n], tier, tokens, tokens * float(hot.sum()) * share)
            if time > gpu_s:
                gpu_s, gpu_bound = time, resource
        if is_recorded and self._tiers[n] not in gpus:
            gpu_s = max(gpu_s, self._beside_s(cost, self._tiers[n], layer, tokens))
        if np.any(chances[in_vram:] > 0):
            read, spread = size * distinct(cold, tokens), size * _spread(chances, in_dram, tokens)
            moved = size * distinct(warm, tokens) + read
            outside = tokens * float(chances[in_vram:].sum())
            brings = not is_recorded  # in a recorded step, experts move to GPUs between steps only
            self._outside_vram(
                cost, moved, read, spread, flops * outside, cpu_s, gpu_s, gpu_bound, brings=brings
            )
            on_gpu = self._is_real_gpu(self._tiers[n])
            wait = e.hand_over_s if is_recorded else e.round_trip_s
            cost.seconds[LATENCY] += any_used(chances[in_vram:], tokens) * wait * on_gpu
        else:
            cost.seconds[gpu_bound if gpu_s >= cpu_s else DRAM] += max(gpu_s, cpu_s)
            cost.disk_idle_s += max(gpu_s, cpu_s)
        if sum(self._is_real_gpu(tier) for tier in gpus) > 1 and not is_recorded:
            cost.seconds[LATENCY] += e.gpu_hop_s

    def _beside_s(self, cost: StepCost, tier: str, layer: LayerShape, tokens: int) -> float:
        """What a GPU computes beside its routed experts in a recorded step: the shared one."""
        shared = layer.shared
        cost.nbytes[tier] += shared.nbytes
        computing_s = self._on(tier, shared.nbytes, 2 * shared.parameters * tokens)[0]
        return computing_s + _beside(layer) * self.efficiency.launch_s

    def _exchange(self, cost: StepCost, asking: str, asked: str, tokens: int, picks: float) -> float:
        """What another GPU's part in a recorded layer takes beside its experts: inputs and outputs go by way
        of host memory, over both links."""
        nbytes = 4 * self.shape.hidden * (tokens + picks)
        time = self.efficiency.exchange_s + SHARE * self.efficiency.launch_s
        for tier in (asking, asked):
            number = int(tier.partition(":")[2])
            cost.nbytes[f"link:{number}"] += nbytes
            time += nbytes / self.hardware.gpus[number].link_bytes_per_s
        return time

    def _outside_vram(
        self,
        cost: StepCost,
        moved: float,
        read: float,
        spread: float,
        flops: float,
        cpu_s: float,
        gpu_s: float,
        gpu_bound: str,
        *,
        brings: bool,
    ) -> None:
        """`moved` bytes of experts in DRAM, `read` of them from NVMe (with a standard deviation of `spread`):
        to the CPU, or over links to GPUs where these bring any.

        The split x (share over the links) makes CPU, links and GPUs finish together; disk and the DRAM
        bus, which everything crosses, work meanwhile.
        """
        e, hardware = self.efficiency, self.hardware
        # Of what was read ahead, the guessed share was right.
        disk = read / hardware.disk_bytes_per_s - e.guessed_share * cost.disk_idle_s
        cpu_s += read / self._rearranged_per_s
        by_cpu, cpu_bound = self._on("dram", moved, flops)
        real = [gpu for gpu in hardware.gpus if gpu.kind == "cuda" and brings]
        links = sum(gpu.link_together_bytes_per_s for gpu in real)
        x, by_link, on_gpu = 0.0, 0.0, 0.0
        if links and moved:
            by_link = moved / links
            memory = sum(gpu.memory_bytes_per_s for gpu in real) * e.vram_share
            on_gpu = max(moved / memory, flops / (sum(g.matmul_flops for g in real) * e.gpu_flops_share))
            x = min(
                (by_cpu + cpu_s) / (by_cpu + by_link),
                (by_cpu + cpu_s - gpu_s) / (by_cpu + on_gpu),
            )
            x = min(1.0, max(0.0, x))
        candidates = {
            cpu_bound: (1 - x) * by_cpu + cpu_s,
            LINK: x * by_link,
            gpu_bound: gpu_s + x * on_gpu,
        }
        bus = (moved + CROSSINGS * read) / self._bus_rate
        others = max(bus, *candidates.values())
        total = _longer(disk, spread / hardware.disk_bytes_per_s, others)
        cost.disk_idle_s = total - max(0.0, disk)
        waiting = total if disk >= others else total - others
        cost.seconds[DISK] += waiting
        rest = total - waiting
        if bus >= others:
            cost.seconds[DRAM] += rest
        elif candidates[gpu_bound] >= others > candidates[cpu_bound]:
            cost.seconds[gpu_bound] += rest
        else:  # CPU and links finish together: by the bytes each took
            cost.seconds[LINK] += x * rest
            cost.seconds[cpu_bound] += (1 - x) * rest
        cost.nbytes["dram"] += moved
        cost.nbytes["nvme"] += read
        for i, gpu in enumerate(hardware.gpus):
            if gpu.kind == "cuda" and links:
                cost.nbytes[f"link:{i}"] += x * moved * gpu.link_together_bytes_per_s / links


def _spread(chances: np.ndarray, in_memory: int, tokens: int) -> float:
    """The standard deviation of how many experts a layer lacks, of which so many, the likeliest, are in
    memory: a token that picks more of these picks fewer of the others."""
    lacking = chances[in_memory:]
    picks, used = float(chances.sum()), 1.0 - (1.0 - lacking) ** tokens
    share = float(lacking.sum()) / picks if picks else 0.0
    return math.sqrt(max(0.0, float((used * (1.0 - used)).sum()) * (1.0 - share)))


def _longer(mean: float, deviation: float, other: float) -> float:
    """What the longer of two takes on average, of which one varies: a layer that lacks more experts than
    others waits for them, and one that lacks fewer cannot give its time away."""
    if deviation <= 0:
        return max(mean, other)
    z = (mean - other) / deviation
    below = 0.5 * math.erfc(-z / math.sqrt(2))
    return other + (mean - other) * below + deviation * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _passing(shape: ModelShape, placement: Placement) -> list[int]:
    """Of each layer, experts in DRAM's slots for those on their way: one stays there until another needs the
    slot, and is found there like those that were placed."""
    staged = sum(r.nbytes for r in placement.reserves if r.name == STAGING and r.tier == "dram")
    slots, layers = staged // max(1, shape.slot_nbytes), sum(layer.experts > 0 for layer in shape.layers)
    shares, seen = [], 0
    for layer in shape.layers:
        before = slots * seen // max(1, layers)
        seen += layer.experts > 0
        shares.append(slots * seen // max(1, layers) - before)
    return shares


def _beside(layer: LayerShape) -> int:
    """Launches of a layer that others' work goes on beside."""
    return beside(has_shared=layer.shared.nbytes > 0)


def _is_recorded(layer: LayerShape, tokens: int) -> bool:
    """Whether a GPU runs the layer in a recorded step."""
    return tokens <= MAX_RECORDED_ROWS and layer.launches is not None
