"""The golden checkpoints of the decoder families: tiny, laid out as released, with reference logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.families.base import Batch, Model, Trace
from engine.families.decoder.forward import Decoder
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from memory.planner.budget import MemoryBudget
from quant.kernels.interface import Kernels
from tests.conftest import BESIDE, GOLDEN

TOLERANCE = 1e-4
PLENTY = MemoryBudget(1 << 30)
SEQUENCES = ("", ".1", ".2")  # what the keys of the three sequences end in
SAFETENSORS = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "mixtral", "minimax_m2", "olmoe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip
NAMES = (
    *SAFETENSORS, "gguf_deepseek2", "gguf_deepseek2_lite", "gguf_gpt_oss", "gguf_qwen3moe", "kimi_k2",
    "qwen3_moe_fp8",
)  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """What is expected of a checkpoint."""

    path: Path
    expected: dict[str, torch.Tensor]

    def ids(self, which: str = "") -> list[int]:
        found: list[int] = self.expected[f"input_ids{which}"].tolist()
        return found

    def logits(self, which: str = "") -> torch.Tensor:
        return self.expected[f"logits{which}"]

    def greedy(self, which: str = "") -> list[int]:
        found: list[int] = self.expected[f"greedy_ids{which}"].tolist()
        return found


def family_path(name: str) -> Path:
    """The directory of a golden set, in the repository or beside it; skips where it is in neither."""
    for folder in (GOLDEN, BESIDE):
        if (folder / "families" / name / "expected.safetensors").is_file():
            return folder / "families" / name
    pytest.skip(f"families/{name} is neither in tests/golden nor in ../shared/golden")


def golden_family(name: str) -> Golden:
    """A golden set."""
    folder = family_path(name)
    path = next(iter(sorted(folder.glob("*.gguf"))), folder)
    return Golden(path, load_file(folder / "expected.safetensors"))


@contextmanager
def loaded(path: Path, kernels: Kernels, budget: MemoryBudget = PLENTY) -> Iterator[Decoder]:
    """The model at `path`, closed in the end."""
    checkpoint = open_checkpoint(path)
    model = family_of(checkpoint).load(checkpoint, kernels, budget)
    assert isinstance(model, Decoder)
    try:
        yield model
    finally:
        model.close()


def logits_in_chunks(model: Model, ids: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Logits of every position, computed in chunks of `sizes`, repeated until the prompt ends."""
    cache = model.new_cache(1, len(ids))
    out: list[torch.Tensor] = []
    start = 0
    for size in itertools.cycle(sizes):
        part = ids[start : start + size]
        if not part:
            break
        out.append(model.forward(Batch.of([(0, start, part)], all_logits=True), cache))
        start += len(part)
    return torch.cat(out)


def greedy_ids(model: Model, ids: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest tokens after `ids`, each after those before it."""
    cache = model.new_cache(1, len(ids) + count)
    found = [int(model.forward(Batch.of([(0, 0, ids)]), cache).argmax())]
    while len(found) < count:
        found.append(int(model.forward(Batch.of([(0, cache.length(0), found[-1:])]), cache).argmax()))
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the tolerance at every logit."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < TOLERANCE


def assert_right_in_a_batch(golden: Golden, model: Model) -> None:
    """All sequences in one cache, in uneven chunks."""
    prompts = [golden.ids(which) for which in SEQUENCES]
    cache = model.new_cache(len(prompts), max(map(len, prompts)))
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for step in range(max(map(len, prompts))):
        parts = []
        for slot, ids in enumerate(prompts):
            start = cache.length(slot)
            part = ids[start : start + (1, 5, 16, 31)[(slot + step) % 4]]
            if part:
                parts.append((slot, start, part))
        if not parts:
            break
        logits = model.forward(Batch.of(parts, all_logits=True), cache)
        for (slot, _, _), rows in zip(parts, logits.split([len(p) for _, _, p in parts]), strict=True):
            found[slot].append(rows)
    for which, rows in zip(SEQUENCES, found, strict=True):
        assert_close(torch.cat(rows), golden.logits(which))


def assert_right_experts(golden: Golden, trace: Trace, layers: Iterable[int]) -> None:
    """Routers of these layers chose what the reference's do for the first sequence, with its weights."""
    for n in layers:
        (chosen,), (weights,) = trace.values[f"router_ids.{n}"], trace.values[f"router_weights.{n}"]
        falling = weights.argsort(dim=-1, descending=True)
        expected = golden.expected[f"router_weights.{n}"]
        assert torch.equal(chosen.sort(dim=-1).values, golden.expected[f"router_ids.{n}"].sort(dim=-1).values)
        torch.testing.assert_close(weights.gather(1, falling), expected, atol=1e-4, rtol=0)


def tiers_in_use(model: Decoder | DeepseekV4, limits: MemoryBudget) -> set[str]:
    """Where experts of a model that has computed something lie, and on disk; it must be within its limits."""
    experts_in = {tier for layer in model.expert_tiers() for tier in layer}
    assert experts_in >= {"nvme", "dram"}
    assert model.telemetry is not None
    seen = model.telemetry.snapshot()
    assert seen.hits["nvme"] > 0
    assert sum(seen.hits.values()) == sum(seen.computed.values())
    used, kv = model.tier_bytes, model.weights.places.kv_room
    assert used["dram"] <= limits.dram_bytes
    for gpu in limits.gpus:
        assert used[gpu.name] + kv.get(gpu.name, 0) <= gpu.budget_bytes
    return experts_in
