"""Decoding a model within budgets, with a clock: time by layer and kind, bytes by tier, and their bound."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.families.base import Batch, KvCache, Trace
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import load
from memory.hardware.detect import peak_resident_bytes, resident_bytes
from memory.planner.budget import MemoryBudget
from memory.planner.cost_model import CROSSINGS
from memory.planner.placement import Workload
from memory.telemetry import Snapshot, since
from quant.errors import ConfigError

PROMPT_TOKENS = 32
# Steps before the clock runs: threads start, the hot places of caches fill, and the kernels of GPUs are
# compiled, which depends on the number of tokens: one, as in the steps that are measured.
WARM_STEPS = 4
PAUSES = 8  # in a run
# The last value that a part of a layer shows -> what the time since the value before it went to.
KINDS = {
    "engram_rows": "addresses",
    "engram_kv": "engram",
    "engram_gate": "engram",
    "index_selected": "attention",
    "attn_out": "attention",
    "router_ids": "router",
    "router_weights": "router",
    "shared_out": "experts",
    "streams": "experts",
}


@dataclass
class Clock(Trace):
    """A trace that keeps no values, but when they came: `seconds[kind][layer]`, -1 for what has no layer.

    gpus  real ones, whose kernels are waited for before the time is read: they are only queued when a part
           of a layer returns, and would be booked on whichever part waits. So parts become strictly serial:
           the host does not prepare the next while GPUs compute, and the step takes longer than without a
           clock. Copies, which have streams of their own, go on.
    """

    seconds: dict[str, dict[int, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    last: float = 0.0
    gpus: tuple[torch.device, ...] = ()

    def add(self, name: str, value: Any) -> None:
        """The time since the value before belongs to what `name` ends."""
        part, _, layer = name.partition(".")
        self.tick(KINDS.get(part, "other"), int(layer) if layer else -1)

    def tick(self, kind: str, layer: int = -1) -> None:
        """The time since the last tick went to `kind`."""
        for gpu in self.gpus:
            torch.cuda.current_stream(gpu).synchronize()
        now = time.perf_counter()
        self.seconds[kind][layer] += now - self.last
        self.last = now


@dataclass(frozen=True)
class SliceRun:
    """What decoding `tokens` tokens, one a step, took and moved.

    total_s      of all steps
    seconds      by kind and layer (-1: none), of as many further steps: these are computed operation by
                 operation, because a recorded step tells nothing of its parts, and take longer
    clocked_s    of these further steps
    layers       of the model; tables: layers with Engram
    dense_bytes  that every token reads: attention, shared experts, router, head
    head_bytes   of these, the head's: it gives the token, of which the first layer's experts are guessed
    gpu_bytes   of dense_bytes, what lies on each real GPU; a virtual one is host memory, and not in here
    head_gpu    the real GPU that the head lies on; None where that is host memory
    expert_bytes of one routed expert in a slot
    counts       hits, computed, moved bytes ... of these steps alone
    tier_bytes   allocated for weights
    grown_bytes  by which the process's peak memory exceeds what it had before loading
    """

    tokens: int
    total_s: float
    seconds: dict[str, dict[int, float]]
    layers: int
    tables: int
    dense_bytes: int
    head_bytes: int
    expert_bytes: int
    counts: Snapshot
    tier_bytes: dict[str, int]
    grown_bytes: int
    clocked_s: float = 0.0
    gpu_bytes: dict[str, int] = field(default_factory=dict)
    head_gpu: str | None = None

    @property
    def disk_bytes_per_s(self) -> float:
        """Of the expert reads of these steps while there were any; 0 where nothing was read."""
        busy_s = self.counts.busy_s.get("nvme", 0.0)
        return self.counts.moved_bytes.get("nvme", 0) / busy_s if busy_s else 0.0

    @property
    def computed_bytes(self) -> int:
        """Of experts that were computed, in all steps."""
        return sum(self.counts.computed.values()) * self.expert_bytes

    def bound_s(
        self,
        dram_bytes_per_s: float,
        disk_bytes_per_s: float,
        link_bytes_per_s: Mapping[str, float],
        gpu_bytes_per_s: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Seconds that each resource needs for these steps' bytes at the given rates, were it always busy.

        Everything that crosses the DRAM bus counts: weights that the CPU multiplies with; experts from disk,
        which are written, rearranged and written again; copies to and from GPUs, once for real ones and
        twice for virtual ones, which are host memory themselves. Of the disk's bytes only those count that
        were needed, and its rate is that of this run where that was better than the measured one.

        gpu_bytes_per_s: of each real GPU's own memory, from which it reads the weights it multiplies with;
        what links bring comes far slower than it is written there, and does not count.
        """
        counts, moved = self.counts, self.counts.moved_bytes
        needed = (counts.hits.get("nvme", 0) + counts.prefetches.get("used", 0)) * self.expert_bytes
        return {
            "dram": self._crossing_bytes / dram_bytes_per_s,
            "nvme": needed / max(disk_bytes_per_s, self.disk_bytes_per_s),
            **{gpu: moved.get(gpu, 0) / rate for gpu, rate in link_bytes_per_s.items()},
            **{
                memory_of(gpu): self._read_by_gpu(gpu) / rate for gpu, rate in (gpu_bytes_per_s or {}).items()
            },
        }

    def ordered_bound_s(self, bounds: dict[str, float]) -> float:
        """The longest of `bound_s`, in order: what only a token can ask for is not read before there is one.

        While the head is computed no expert is known to be needed, and only the memory that it lies in has
        work.
        """
        resource, nbytes = "dram", self._crossing_bytes
        if self.head_gpu is not None:
            resource, nbytes = memory_of(self.head_gpu), self._read_by_gpu(self.head_gpu)
        in_head = bounds[resource] * self.tokens * self.head_bytes / nbytes
        others = [seconds for name, seconds in bounds.items() if name != resource]
        return in_head + max(*others, bounds[resource] - in_head)

    def _read_by_gpu(self, gpu: str) -> int:
        """Bytes of weights that a real GPU multiplied with in all steps."""
        experts = self.counts.computed.get(gpu, 0) * self.expert_bytes
        return self.tokens * self.gpu_bytes[gpu] + experts

    @property
    def _crossing_bytes(self) -> int:
        """Bytes over the DRAM bus in all steps."""
        weights = self.tokens * self.dense_bytes + self.computed_bytes
        on_gpus = sum(self._read_by_gpu(gpu) for gpu in self.gpu_bytes)
        copies = sum(
            nbytes * (1 if link.partition(" ")[0] in self.gpu_bytes else 2)
            for link, nbytes in self.counts.moved_bytes.items()
            if link.startswith("vram")
        )
        return weights - on_gpus + CROSSINGS * self.counts.moved_bytes.get("nvme", 0) + copies

    def like(self, layers: int, tables: int) -> float:
        """Seconds a token would take with so many layers and tables that cost what this model's do.

        Each part is taken to have the share of `total_s` that the clock gave it.
        """
        clocked_s = sum(sum(layer.values()) for layer in self.seconds.values())
        of_token = self.total_s / clocked_s / self.tokens
        by_kind = {kind: sum(layer.values()) * of_token for kind, layer in self.seconds.items()}
        in_layers = sum(by_kind.get(kind, 0.0) for kind in ("attention", "router", "experts")) / self.layers
        engram = by_kind.get("engram", 0.0) / max(self.tables, 1)
        return in_layers * layers + engram * tables + by_kind["head"] + by_kind.get("addresses", 0.0)


def memory_of(gpu: str) -> str:
    """What `SliceRun.bound_s` calls a real GPU's own memory; its link goes by the GPU's name."""
    return f"{gpu} memory"


def steps(tokens: int) -> int:
    """How many steps `run_slice` makes after those that warm up: the second half for the clock."""
    return 2 * tokens


def workload(tokens: int) -> Workload:
    """What `run_slice` asks of a model."""
    return Workload(PROMPT_TOKENS + WARM_STEPS + steps(tokens), 1, PROMPT_TOKENS)


def run_slice(
    path: Path,
    budget: MemoryBudget,
    tokens: int,
    on_progress: Callable[[int], None],
    in_pause: Callable[[], None] = lambda: None,
) -> SliceRun:
    """Load `path`, read a short prompt and decode `tokens` random tokens, one sequence alone.

    Random tokens stand for text that repeats nothing: caches see as many new rows and experts as can
    be. Before some of the tokens no time is counted and `in_pause` is called. As many tokens follow, for the
    time of each layer alone. Raises ConfigError for a model without routed experts,
    and what loading raises.
    """
    before = resident_bytes()
    loaded = load(path, budget)
    model = loaded.model
    try:
        if not isinstance(model, DeepseekV41):
            raise ConfigError(f"{path}: this model has no routed experts, so nothing would move")
        dense = {
            part.kind: part.nbytes
            for part in loaded.components
            if part.kind not in ("embedding", "engram", "routed_experts")
        }
        gpus = {gpu.name: gpu.device for gpu in budget.gpus if not gpu.is_virtual}
        length = workload(tokens).context
        ids = torch.randint(3, model.info.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        cache = model.new_cache(1, length)
        model.forward(Batch.of([(0, 0, ids[:PROMPT_TOKENS].tolist())]), cache)
        start = PROMPT_TOKENS + WARM_STEPS
        for at in range(PROMPT_TOKENS, start):
            _step(model, cache, at, int(ids[at]), None)
        counted, clock = model.telemetry.snapshot(), Clock(gpus=tuple(gpus.values()))
        total_s = 0.0
        for at in range(start, start + tokens):
            if (at - start) % max(1, tokens // PAUSES) == 0:
                in_pause()
            total_s += _step(model, cache, at, int(ids[at]), None)
            on_progress(at + 1 - start)
        counts = since(counted, model.telemetry.snapshot())
        clocked_s = 0.0
        for at in range(start + tokens, length):
            clocked_s += _step(model, cache, at, int(ids[at]), clock)
            on_progress(at + 1 - start)
        places = model.weights.places
        return SliceRun(
            tokens=tokens,
            total_s=total_s,
            seconds={kind: dict(by_layer) for kind, by_layer in clock.seconds.items()},
            layers=model.config.num_hidden_layers,
            tables=len(model.config.engram_layer_ids),
            dense_bytes=sum(dense.values()),
            head_bytes=dense["head"],
            expert_bytes=model.weights.experts.slots.dram.arena.slot_bytes,
            counts=counts,
            tier_bytes=model.tier_bytes,
            grown_bytes=peak_resident_bytes() - before,
            clocked_s=clocked_s,
            # beside them, tables made of a router's weights may lie there
            gpu_bytes={gpu: min(places.nbytes.get(gpu, 0), sum(dense.values())) for gpu in gpus},
            head_gpu=next((gpu for gpu, device in gpus.items() if device == places.head), None),
        )
    finally:
        model.close()


def _step(model: DeepseekV41, cache: KvCache, at: int, token: int, clock: Clock | None) -> float:
    """Compute a token; the seconds that it took."""
    begun = time.perf_counter()
    if clock is not None:
        clock.last = begun
    model.forward(Batch.of([(0, at, [token])]), cache, clock)
    if clock is not None:
        clock.tick("head")
        return clock.last - begun
    return time.perf_counter() - begun
