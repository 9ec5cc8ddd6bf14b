"""Decoding a model within budgets, with a clock: time by layer and kind, bytes by tier, and their bound."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.families.deepseek_v41 import DeepseekV41
from engine.loader import load
from engine.model import Batch, KvCache, Trace
from memory.budget import MemoryBudget
from memory.cost_model import CROSSINGS
from memory.hardware import peak_resident_bytes, resident_bytes
from memory.plan import Workload
from memory.telemetry import Snapshot
from quant.errors import ConfigError

PROMPT_TOKENS = 32
# Steps before the clock runs: threads start, and the hot places of caches fill.
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
    """A trace that keeps no values, but when they came: `seconds[kind][layer]`, -1 for what has no layer."""

    seconds: dict[str, dict[int, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    last: float = 0.0

    def add(self, name: str, value: Any) -> None:
        """The time since the value before belongs to what `name` ends."""
        part, _, layer = name.partition(".")
        self.tick(KINDS.get(part, "other"), int(layer) if layer else -1)

    def tick(self, kind: str, layer: int = -1) -> None:
        """The time since the last tick went to `kind`."""
        now = time.perf_counter()
        self.seconds[kind][layer] += now - self.last
        self.last = now


@dataclass(frozen=True)
class SliceRun:
    """What decoding `tokens` tokens, one a step, took and moved.

    total_s      of all steps
    seconds      by kind and layer (-1: none), of all steps
    layers       of the model; tables: layers with Engram
    dense_bytes  that every token reads: attention, shared experts, router, head
    head_bytes   of these, the head's: it gives the token, of which the first layer's experts are guessed
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
        self, dram_bytes_per_s: float, disk_bytes_per_s: float, link_bytes_per_s: dict[str, float]
    ) -> dict[str, float]:
        """Seconds that each resource needs for these steps' bytes at the given rates, were it always busy.

        Everything that crosses the DRAM bus counts: weights that are multiplied with; experts from disk,
        which are written, rearranged and written again; copies between DRAM and virtual cards, which both
        are host memory. Of the disk's bytes only those count that were needed, and its rate is that of this
        run where that was better than the measured one.
        """
        counts, moved = self.counts, self.counts.moved_bytes
        needed = (counts.hits.get("nvme", 0) + counts.prefetches.get("used", 0)) * self.expert_bytes
        return {
            "dram": self._crossing_bytes / dram_bytes_per_s,
            "nvme": needed / max(disk_bytes_per_s, self.disk_bytes_per_s),
            **{card: moved.get(card, 0) / rate for card, rate in link_bytes_per_s.items()},
        }

    def ordered_bound_s(self, bounds: dict[str, float]) -> float:
        """The longest of `bound_s`, in order: what only a token can ask for is not read before there is one.

        While the head is computed no expert is known to be needed, and only DRAM has work.
        """
        dram = bounds["dram"]
        in_head = dram * self.tokens * self.head_bytes / self._crossing_bytes
        others = [seconds for resource, seconds in bounds.items() if resource != "dram"]
        return in_head + max(*others, dram - in_head)

    @property
    def _crossing_bytes(self) -> int:
        """Bytes over the DRAM bus in all steps."""
        moved = self.counts.moved_bytes
        copied = sum(nbytes for link, nbytes in moved.items() if link.startswith("vram"))
        from_disk = CROSSINGS * moved.get("nvme", 0)
        return self.tokens * self.dense_bytes + self.computed_bytes + from_disk + 2 * copied

    def like(self, layers: int, tables: int) -> float:
        """Seconds a token would take with so many layers and tables that cost what this model's do."""
        by_kind = {kind: sum(layer.values()) / self.tokens for kind, layer in self.seconds.items()}
        in_layers = sum(by_kind.get(kind, 0.0) for kind in ("attention", "router", "experts")) / self.layers
        engram = by_kind.get("engram", 0.0) / max(self.tables, 1)
        return in_layers * layers + engram * tables + by_kind["head"] + by_kind.get("addresses", 0.0)


def workload(tokens: int) -> Workload:
    """What `run_slice` asks of a model."""
    return Workload(PROMPT_TOKENS + WARM_STEPS + tokens, 1, PROMPT_TOKENS)


def run_slice(
    path: Path,
    budget: MemoryBudget,
    tokens: int,
    on_progress: Callable[[int], None],
    in_pause: Callable[[], None] = lambda: None,
) -> SliceRun:
    """Load `path`, read a short prompt and decode `tokens` random tokens, one sequence alone.

    Random tokens stand for text that repeats nothing: caches see as many new rows and experts as can
    be. Before some of the tokens the clock stands still and `in_pause` is called. Raises ConfigError for a
    model without routed experts, and what loading raises.
    """
    before = resident_bytes()
    loaded = load(path, budget)
    model = loaded.model
    try:
        if not isinstance(model, DeepseekV41):
            raise ConfigError(f"{path}: this model has no routed experts; there is nothing that would move")
        dense = {
            part.kind: part.nbytes
            for part in loaded.components
            if part.kind not in ("embedding", "engram", "routed_experts")
        }
        length = PROMPT_TOKENS + WARM_STEPS + tokens
        ids = torch.randint(3, model.info.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        cache = model.new_cache(1, length)
        model.forward(Batch.of([(0, 0, ids[:PROMPT_TOKENS].tolist())]), cache)
        start = PROMPT_TOKENS + WARM_STEPS
        for at in range(PROMPT_TOKENS, start):
            _step(model, cache, at, int(ids[at]), Clock())
        counted, clock = model.telemetry.snapshot(), Clock()
        total_s = 0.0
        for at in range(start, length):
            if (at - start) % max(1, tokens // PAUSES) == 0:
                in_pause()
            total_s += _step(model, cache, at, int(ids[at]), clock)
            on_progress(at + 1 - start)
        return SliceRun(
            tokens=tokens,
            total_s=total_s,
            seconds={kind: dict(by_layer) for kind, by_layer in clock.seconds.items()},
            layers=model.config.num_hidden_layers,
            tables=len(model.config.engram_layer_ids),
            dense_bytes=sum(dense.values()),
            head_bytes=dense["head"],
            expert_bytes=model.weights.experts.layout.nbytes,
            counts=_since(counted, model.telemetry.snapshot()),
            tier_bytes=model.tier_bytes,
            grown_bytes=peak_resident_bytes() - before,
        )
    finally:
        model.close()


def _step(model: DeepseekV41, cache: KvCache, at: int, token: int, clock: Clock) -> float:
    """Compute a token; the seconds that it took."""
    begun = clock.last = time.perf_counter()
    model.forward(Batch.of([(0, at, [token])]), cache, clock)
    clock.tick("head")
    return clock.last - begun


def _since(before: Snapshot, after: Snapshot) -> Snapshot:
    """Counters of the time between two snapshots."""
    changes: dict[str, dict[str, Any]] = {
        name: {label: n - vars(before)[name].get(label, 0) for label, n in counter.items()}
        for name, counter in vars(after).items()
    }
    return Snapshot(**changes)
