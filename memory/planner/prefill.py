"""What a prompt costs, chunk by chunk and layer by layer, as the engine computes it.

In a chunk that uses nearly all of a layer's experts these stream past (memory/experts/streamed.py): disk and
links run ahead of the layers, as far as their rings of slots go, while GPUs and processor compute. V4.1's
late layers compute a prompt's last tokens alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from memory.experts.store import BLOCK_TOKENS
from memory.experts.streaming import STARTING_S, carrying_s, is_streamed, ring_slots
from memory.hardware.profiles import HardwareProfile
from memory.planner.cost_model import (
    CPU,
    CROSSINGS,
    DISK,
    DRAM,
    GPU,
    LATENCY,
    LINK,
    CostModel,
    Efficiency,
    StepCost,
)
from memory.planner.placement import SLOTS, Placement, Workload
from memory.planner.placing import plan
from memory.planner.routing import UNIFORM, Routing, distinct
from memory.planner.shape import LayerShape, ModelShape
from memory.planner.workspace import lent_bytes, workspace_bytes

VALUE_BYTES = 4  # of activations
SMALLEST_CHUNK, LARGEST_CHUNK = 512, 32_768
# A chunk twice as large must be worth something: of the best rate, the smallest chunk with so much is taken.
ENOUGH = 0.98
# Of host memory, what activations may take: of all of it, and of what weights and caches leave unused.
HOST_SHARE, UNUSED_SHARE = 1 / 16, 1 / 4
# Of decoding's rate, what a large chunk's workspace may cost.
DECODE_KEEPS = 0.97


@dataclass(frozen=True)
class _Chunks:
    """So many chunks of `tokens` tokens, after `held` tokens on average; `to_come` follow in the prompt."""

    count: int
    tokens: int
    held: float
    to_come: int


class PrefillModel(CostModel):
    """Predicts prompts of a placed model on a machine under a routing, and steps."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: HardwareProfile,
        placement: Placement,
        routing: Routing,
        efficiency: Efficiency | None = None,
    ) -> None:
        super().__init__(shape, hardware, placement, routing, efficiency)
        self._slots: Counter[str] = Counter()  # of each tier, for experts
        for places in self._experts:
            self._slots.update(places)
        self._rings = {
            tier: ring_slots(count)
            for tier, count in self._slots.items()
            if tier.startswith("vram") and ring_slots(count)
        }

    def prefill(self, chunk: int, prompt: int, held: int = 0) -> StepCost:
        """A prompt of `prompt` tokens of one sequence that holds `held` tokens before them, in chunks."""
        meanwhile = copy(self)
        meanwhile._experts = self._held_meanwhile(chunk)
        total = StepCost(prompt)
        hits: dict[str, float] = defaultdict(float)
        tail = max((layer.tail or 0 for layer in self.shape.layers), default=0)
        for alike in _chunks(chunk, prompt, tail):
            of_each: dict[str, float] = defaultdict(float)
            total.add(meanwhile._chunk(alike, int(held + alike.held), of_each), alike.count)
            for tier, picks in of_each.items():
                hits[tier] += alike.count * picks
        tier = self.placement.tier_of("head", None)
        time, resource = self._on(tier, self.shape.head.nbytes, 2 * self.shape.head.parameters)
        total.seconds[resource] += time
        total.nbytes[tier] += self.shape.head.nbytes
        picks = sum(hits.values())
        total.hit_rates = {tier: hits[tier] / picks if picks else 0.0 for tier in ("vram", "dram", "nvme")}
        total.seconds = {resource: time for resource, time in total.seconds.items() if time > 0}
        total.nbytes = {tier: nbytes for tier, nbytes in total.nbytes.items() if nbytes > 0}
        return total

    def has_room_for(self, chunk: int) -> bool:
        """Whether each GPU's slots can lend what such a chunk is computed with."""
        lent = lent_bytes(self.shape, replace(self.placement.workload, prefill_chunk=chunk))
        return all(
            self._slots[f"vram:{n}"] // 2 * self.shape.expert_nbytes >= lent
            for n, gpu in enumerate(self.hardware.gpus)
            if gpu.kind == "cuda" and any(r.tier == f"vram:{n}" for r in self.placement.reserves)
        )

    def _held_meanwhile(self, chunk: int) -> list[dict[str, int]]:
        """How many of each layer's experts the tiers hold while a prompt borrows slots for its chunks."""
        size, placement = max(1, self.shape.expert_nbytes), self.placement
        on_gpus = sum(count for tier, count in self._slots.items() if tier.startswith("vram"))
        beside = sum(r.nbytes for r in placement.reserves if r.name in SLOTS and r.tier == "dram")
        has_copies = not self._slots["nvme"] and beside >= on_gpus * self.shape.slot_nbytes
        lent = lent_bytes(self.shape, replace(placement.workload, prefill_chunk=chunk))
        shares: dict[str, float] = {}
        for tier, count in self._slots.items():
            borrowed = ring_slots(count) if tier != "dram" or not has_copies else 0
            if self._is_real_gpu(tier):
                borrowed += min(count // 2, -(-lent // size))
            shares[tier] = borrowed / count if count and tier != "nvme" else 0.0
        meanwhile = []
        for places in self._experts:
            held = {tier: int(count * (1.0 - shares[tier])) for tier, count in places.items()}
            below = "dram" if has_copies else "nvme"
            held[below] = held.get(below, 0) + sum(places.values()) - sum(held.values())
            meanwhile.append({tier: count for tier, count in held.items() if count})
        return meanwhile

    def _chunk(self, alike: _Chunks, held: int, hits: dict[str, float]) -> StepCost:
        cost = StepCost(alike.tokens)
        self._embedding(cost, alike.tokens)
        for n, layer in enumerate(self.shape.layers):
            tokens = alike.tokens
            if layer.tail is not None:
                tokens = min(tokens, max(0, layer.tail - alike.to_come))
            if not tokens:
                continue
            part = StepCost(tokens)
            if layer.table is not None:
                self._rows(cost, n, layer.table, tokens)
            if layer.experts and is_streamed(tokens, self.shape.top_k, layer.experts):
                self._streamed(part, hits, n, layer, tokens, held)
            else:
                self._dense(part, n, layer, tokens, 1, held)
                if layer.experts:
                    self._routed(part, hits, n, layer, tokens)
            cost.add(part, 1.0)
        return cost

    def _streamed(
        self, cost: StepCost, hits: dict[str, float], n: int, layer: LayerShape, tokens: int, held: int
    ) -> None:
        """A layer whose experts stream past."""
        e, hardware = self.efficiency, self.hardware
        size, flops = layer.expert.nbytes, 2 * layer.expert.parameters
        chances = self.routing.picks(n, layer.experts, self.shape.top_k)
        places = self._experts[n]
        on_gpus = {tier: count for tier, count in places.items() if tier.startswith("vram") and count}
        in_vram = sum(on_gpus.values())
        in_dram = in_vram + places.get("dram", 0)
        outside = chances[in_vram:]
        for tier, part in (
            ("vram", chances[:in_vram]),
            ("dram", chances[in_vram:in_dram]),
            ("nvme", chances[in_dram:]),
        ):
            hits[tier] += tokens * float(part.sum())

        dense, of_dense = self._dense_s(cost, n, layer, tokens, held)
        resident = tokens * float(chances[:in_vram].sum())  # uses
        read = size * distinct(chances[in_dram:], tokens)
        moved = size * distinct(outside, tokens)
        cpu_s = read / self._rearranged_per_s
        gpu_s: dict[str, float] = defaultdict(float)
        for tier, count in on_gpus.items():
            nbytes = size * distinct(chances[:in_vram], tokens) * count / in_vram
            time, _ = self._on(tier, nbytes, flops * resident * count / in_vram)
            cost.nbytes[tier] += nbytes
            if self._is_real_gpu(tier):
                gpu_s[tier] += time
            else:
                cpu_s += time

        used = 1.0 - (1.0 - outside) ** tokens
        costs = np.maximum(used * size / self._cpu_rate, tokens * outside * flops / hardware.cpu_matmul_flops)
        links = {
            tier: hardware.gpus[int(tier.partition(":")[2])].link_together_bytes_per_s
            for tier in self._rings
            if self._is_real_gpu(tier)
        }
        rate = sum(links.values())
        sending_s, by_cpu, launching = 0.0, float(costs.sum()), 0.0
        if links:
            ahead = min(dense, size * sum(self._rings[tier] for tier in links) / rate)
            row, uses_in_all = VALUE_BYTES * self.shape.hidden, tokens * self.shape.top_k
            carrying = carrying_s(uses_in_all, tokens, row, list(links.values()))
            starting = STARTING_S * (in_vram + np.concatenate((np.cumsum(used)[::-1], [0.0])))
            by_cpu, sending_s, sent, uses = _divided(
                costs + tokens * outside * row / min(links.values()),
                used * size / rate,
                tokens * outside,
                ahead,
                carrying,
                starting,
            )
            for tier in links:
                share = links[tier] / rate
                gpu = hardware.gpus[int(tier.partition(":")[2])]
                memory_s = sent * rate * share / (gpu.memory_bytes_per_s * e.vram_share)
                gpu_s[tier] += max(memory_s, flops * uses * share / (gpu.matmul_flops * e.gpu_flops_share))
            launching = STARTING_S * (in_vram + sent * rate / size)
            for tier in links:
                cost.nbytes[f"link:{tier.partition(':')[2]}"] += sent * links[tier]
        elif self._rings:
            cpu_s += self._copied_s(cost, costs, used * size)
        cpu_s += by_cpu
        computing = max(cpu_s, launching, *gpu_s.values())
        ring = size * ring_slots(self._slots["dram"])
        reading = read / hardware.disk_bytes_per_s
        disk = dense + max(0.0, reading - min(dense, ring / hardware.disk_bytes_per_s)) if reading else 0.0
        bus = (cost.nbytes["dram"] + moved + CROSSINGS * read) / self._bus_rate
        total = max(dense + max(computing, sending_s), disk, bus)
        cost.nbytes["dram"] += moved
        cost.nbytes["nvme"] += read
        if disk >= total and reading > 0:
            cost.seconds[DISK] += total
        elif bus >= total:
            cost.seconds[DRAM] += total
        else:
            cost.seconds[of_dense] += dense
            rest = LINK if sending_s > computing else CPU if cpu_s >= computing else GPU
            if rest == GPU and launching >= computing:
                rest = LATENCY
            cost.seconds[rest] += total - dense

    def _copied_s(self, cost: StepCost, costs: np.ndarray, nbytes: np.ndarray) -> float:
        """What the processor takes to copy experts to virtual GPUs, for which it computes them too: `costs`
        and `nbytes` of each, the most used first."""
        links = {
            tier: self.hardware.gpus[int(tier.partition(":")[2])].link_together_bytes_per_s
            for tier in self._rings
        }
        rate = sum(links.values())
        nothing = np.zeros(len(costs) + 1)
        _, _, sent, _ = _divided(costs, nbytes / rate, nbytes, 0.0, 0.0, nothing)
        for tier, of_link in links.items():
            cost.nbytes[f"link:{tier.partition(':')[2]}"] += sent * of_link
        return 2 * sent * rate / self.hardware.dram_bytes_per_s  # read and written

    def _dense_s(
        self, cost: StepCost, n: int, layer: LayerShape, tokens: int, held: int
    ) -> tuple[float, str]:
        """The layer's dense part, in blocks of tokens whose operations are started one by one, and what it is
        bound by. A GPU computes while the next operations are started."""
        part = StepCost(tokens)
        self._dense(part, n, layer, tokens, 1, held)
        for tier, nbytes in part.nbytes.items():
            cost.nbytes[tier] += nbytes
        starting = part.seconds.pop(LATENCY, 0.0) * -(-tokens // BLOCK_TOKENS)
        working = sum(part.seconds.values())
        bound = max(part.seconds, key=lambda resource: part.seconds[resource])
        if not self._is_real_gpu(self._tiers[n]):
            return working + starting, bound
        return max(working, starting), bound if working >= starting else LATENCY


def _chunks(chunk: int, prompt: int, tail: int) -> Iterator[_Chunks]:
    """The chunks of a prompt: those before its tail together, then one by one."""
    count = -(-prompt // chunk)
    alike = max(0, count - 1 - -(-tail // chunk))
    if alike:
        yield _Chunks(alike, chunk, alike * chunk / 2, prompt - alike * chunk)
    for number in range(alike, count):
        start = number * chunk
        tokens = min(chunk, prompt - start)
        yield _Chunks(1, tokens, start + tokens / 2, prompt - start - tokens)


def _divided(
    costs: np.ndarray,
    sending: np.ndarray,
    uses: np.ndarray,
    ahead: float,
    carrying: float,
    starting: np.ndarray,
) -> tuple[float, float, float, float]:
    """Experts, most used first, between processor and links so that both finish together: seconds of each,
    and seconds and uses of all that was sent.

    ahead     seconds for which the links worked before
    carrying  seconds for which they carry something else
    starting  what GPUs' operations take to start, by how many experts the processor takes, `[experts + 1]`
    """
    # From the least used one on: what the processor has taken, and what is left to the links.
    by_cpu = np.concatenate(([0.0], np.cumsum(costs[::-1])))
    left = np.maximum(0.0, np.concatenate((np.cumsum(sending)[::-1], [0.0])) - ahead) + carrying
    taken = np.concatenate(([0.0], np.cumsum(sending[::-1])))
    used = np.concatenate(([0.0], np.cumsum(uses[::-1])))
    numbers = np.arange(len(by_cpu), dtype=float)
    surplus = by_cpu - np.maximum(left, starting)  # grows with every expert that the processor takes
    at = float(np.interp(0.0, surplus, numbers)) if surplus[-1] > surplus[0] else 0.0
    cpu_s, link_s = float(np.interp(at, numbers, by_cpu)), float(np.interp(at, numbers, left))
    return (
        cpu_s,
        link_s,
        float(taken[-1] - np.interp(at, numbers, taken)),
        float(used[-1] - np.interp(at, numbers, used)),
    )


def planned_chunk(shape: ModelShape, hardware: HardwareProfile, workload: Workload) -> int:
    """Tokens of a prompt's chunk on a machine: as many as pay, as far as their workspace leaves decoding what
    it needs. The workload's own chunk does not count."""
    rates: dict[int, float] = {}
    decoding = 0.0
    chunk = SMALLEST_CHUNK
    while chunk <= LARGEST_CHUNK and (chunk < 2 * workload.context or not rates):
        tokens = min(chunk, workload.context)
        placement = plan(shape, hardware, replace(workload, prefill_chunk=tokens))
        if not placement.fits:
            break
        model = PrefillModel(shape, hardware, placement, UNIFORM)
        if not model.has_room_for(tokens):
            break
        is_on_host = all(gpu.kind == "virtual" for gpu in hardware.gpus)
        work = workspace_bytes(shape, placement.workload)
        unused = placement.budgets["dram"] - placement.used("dram") + work
        if rates and is_on_host and work > max(HOST_SHARE * hardware.dram_bytes, UNUSED_SHARE * unused):
            break
        rate = model.decode(1, workload.context // 2).tokens_per_s
        decoding = decoding or rate
        if rate < DECODE_KEEPS * decoding:
            break
        rates[tokens] = model.prefill(tokens, workload.context).tokens_per_s
        chunk *= 2
    if not rates:
        return min(SMALLEST_CHUNK, workload.context)
    best = max(rates.values())
    return next(tokens for tokens, rate in rates.items() if rate >= ENOUGH * best)
