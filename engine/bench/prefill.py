"""Prompts with a clock: within budgets, and with late layers for all of their tokens or for the end alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.families.base import Batch, KvCache, Model, Segment
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import open_model
from memory.hardware.detect import peak_resident_bytes, resident_bytes
from memory.planner.budget import MemoryBudget
from memory.planner.cost_model import CROSSINGS
from memory.planner.placement import Workload
from memory.planner.shape import ModelShape
from memory.planner.workspace import workspace_bytes
from memory.telemetry import Snapshot, since
from quant.errors import ConfigError

WARM_TOKENS = 64


@dataclass(frozen=True)
class PrefillRun:
    """What computing a prompt of `tokens` tokens took and moved.

    dense_flops   of what it computes beside routed experts: weights, attention
    expert_flops  of chosen experts
    expert_bytes  of one routed expert in a slot
    counts        hits, moved bytes ... of this prompt alone
    work_bytes    that the plan keeps for a chunk's activations
    grown_bytes   by which the process's peak memory exceeds what it had once the model was loaded
    """

    tokens: int
    chunk: int
    total_s: float
    dense_flops: float
    expert_flops: float
    expert_bytes: int
    counts: Snapshot
    work_bytes: int
    grown_bytes: int

    def bound_s(
        self,
        dense_flops_per_s: float,
        expert_flops_per_s: float,
        dram_bytes_per_s: float,
        disk_bytes_per_s: float,
        link_bytes_per_s: Mapping[str, float],
    ) -> dict[str, float]:
        """Seconds that each resource needs at the given rates, were it always busy: the processor for the
        arithmetic (dense weights and experts have formats of their own), disk and links for what they moved,
        memory for what crosses its bus on the way."""
        moved = self.counts.moved_bytes
        read = self.counts.hits.get("nvme", 0) * self.expert_bytes
        sent = {gpu: moved.get(gpu, 0) for gpu in link_bytes_per_s}
        crossing = (CROSSINGS + 1) * read + 2 * sum(sent.values())
        return {
            "arithmetic": self.dense_flops / dense_flops_per_s + self.expert_flops / expert_flops_per_s,
            "dram": crossing / dram_bytes_per_s,
            "nvme": read / disk_bytes_per_s,
            **{gpu: nbytes / link_bytes_per_s[gpu] for gpu, nbytes in sent.items()},
        }


def flops_of(shape: ModelShape, tokens: int) -> tuple[float, float]:
    """Of a prompt's dense part and of its routed experts, by the planner's shape of the model; a layer's last
    tokens alone where that is enough."""
    dense, of_experts = 2.0 * shape.head.parameters, 0.0
    for layer in shape.layers:
        computed = tokens if layer.tail is None else min(tokens, layer.tail)
        weights = layer.dense + layer.shared
        dense += computed * (2 * weights.parameters + layer.kv.flops(tokens // 2))
        of_experts += computed * 2 * layer.expert.parameters * (shape.top_k if layer.experts else 0)
    return dense, of_experts


def run_prefill(
    path: Path,
    budget: MemoryBudget,
    tokens: int,
    chunk: int,
    in_pause: Callable[[], None] = lambda: None,
) -> PrefillRun:
    """Load `path`, compute a prompt of random tokens in chunks, and one before that warms up.

    Raises ConfigError for a model without routed experts, and what loading raises.
    """
    opened = open_model(path)
    shape = opened.family.shape(opened.checkpoint, budget.kv_format)
    asked = Workload(tokens, 1, chunk)
    model = opened.load(replace(budget, workload=asked)).model
    try:
        telemetry = model.telemetry
        if telemetry is None:
            raise ConfigError(f"{path}: this model has no routed experts, so nothing would stream")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.info.vocab_size, (tokens,), generator=generator).tolist()
        cache = model.new_cache(1, tokens)
        prompt_s(model, cache, ids[:WARM_TOKENS], WARM_TOKENS)
        in_pause()
        before, counted = resident_bytes(), telemetry.snapshot()
        total_s = prompt_s(model, cache, ids, chunk)
        counts = since(counted, telemetry.snapshot())
        in_pause()
        dense, of_experts = flops_of(shape, tokens)
        return PrefillRun(
            tokens=tokens,
            chunk=chunk,
            total_s=total_s,
            dense_flops=dense,
            expert_flops=of_experts,
            expert_bytes=shape.expert_nbytes,
            counts=counts,
            work_bytes=workspace_bytes(shape, asked),
            grown_bytes=max(0, peak_resident_bytes() - before),
        )
    finally:
        model.close()


def prompt_s(model: Model, cache: KvCache, ids: Sequence[int], chunk: int, *, whole: bool = False) -> float:
    """Seconds that a prompt takes in chunks, up to the logits behind it; whole: all layers for all tokens."""
    cache.reset(0)
    started = time.perf_counter()
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        to_come = len(ids) - start - len(part)
        wanted = [] if to_come else [len(part) - 1]
        segments = (Segment(0, start, len(part)),)
        model.forward(Batch(part, segments, wanted, None if whole else (to_come,)), cache)
    return time.perf_counter() - started


def tail_bound(model: DeepseekV41, tokens: int) -> float:
    """Rows of all layers, over those that are computed: as if all layers cost the same, and nothing else."""
    c = model.config
    tails = [
        min(tokens, c.tail_of(layer) + model.cache_shape.margin)
        for layer in range(c.num_hidden_layers)
        if layer >= c.first_tail_layer - 1 and c.has_tail
    ]
    return c.num_hidden_layers * tokens / ((c.num_hidden_layers - len(tails)) * tokens + sum(tails))


def tail_flops_bound(shape: ModelShape, tokens: int) -> float:
    """Arithmetic of a prompt with all layers for all tokens, over what is computed of it: attention's and
    index scores' too, which early sources need for every token, were all of it equally fast."""
    whole = replace(shape, layers=tuple(replace(layer, tail=None) for layer in shape.layers))
    return sum(flops_of(whole, tokens)) / sum(flops_of(shape, tokens))


def tail_pairs(model: DeepseekV41, tokens: int, chunk: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of a prompt with all layers for all tokens, and with late layers for its end, in turns."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.info.vocab_size, (tokens,), generator=generator).tolist()
    cache = model.new_cache(1, tokens)
    pairs = [
        (prompt_s(model, cache, ids, chunk, whole=True), prompt_s(model, cache, ids, chunk))
        for _ in range(rounds + 1)
    ]
    return pairs[1:]  # the first one warms up
