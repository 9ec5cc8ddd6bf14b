"""The slice benchmark on real GPUs: whose memory the bytes come from, and a clock that waits for kernels.

The arithmetic is checked on runs made by hand, the run on GPUs that exist in name only.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.bench import slice as bench_slice
from engine.bench.slice import PROMPT_TOKENS, SliceRun, memory_of, run_slice, workload
from engine.families.registry import family_of
from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from memory.planner.cost_model import CROSSINGS
from memory.planner.placing import GPU_BASE_BYTES
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.kernels.choice import choose
from quant.kernels.devices import DeviceKernels
from tests.engine.families.test_virtual_gpus import OneGpu
from tests.pretend_gpus import pretend_gpus

TOKENS, EXPERT, DENSE, HEAD = 10, 1000, 60_000, 20_000
LINKS = {"vram:0": 50e9, "vram:1": 25e9}
MEMORIES = {"vram:0": 4e12, "vram:1": 1e12}


def run_with(
    computed: dict[str, int],
    moved: dict[str, int],
    gpu_bytes: dict[str, int],
    head_gpu: str | None = None,
) -> SliceRun:
    """Ten tokens whose layers and head took a second each."""
    telemetry = Telemetry()
    for counter, labels in (("computed", computed), ("hits", computed), ("moved_bytes", moved)):
        for label, n in labels.items():
            telemetry.add(counter, label, n)
    return SliceRun(
        tokens=TOKENS,
        total_s=2.0,
        seconds={"attention": {0: 1.0}, "router": {0: 0.0}, "experts": {0: 1.0}, "head": {-1: 2.0}},
        layers=1,
        tables=0,
        dense_bytes=DENSE,
        head_bytes=HEAD,
        expert_bytes=EXPERT,
        counts=telemetry.snapshot(),
        tier_bytes={},
        grown_bytes=0,
        gpu_bytes=gpu_bytes,
        head_gpu=head_gpu,
    )


def test_what_a_gpu_computes_with_is_read_from_its_own_memory() -> None:
    run = run_with({"vram:0": 300, "dram": 100}, {}, {"vram:0": DENSE}, "vram:0")
    bounds = run.bound_s(1e9, 1e9, {"vram:0": 50e9}, {"vram:0": 4e12})
    assert bounds[memory_of("vram:0")] == pytest.approx((TOKENS * DENSE + 300 * EXPERT) / 4e12)
    assert bounds["dram"] == pytest.approx(100 * EXPERT / 1e9)
    assert bounds["vram:0"] == 0.0


def test_layers_without_room_on_a_gpu_are_read_from_dram() -> None:
    run = run_with({"vram:0": 1}, {}, {"vram:0": 45_000})
    assert run.bound_s(1e9, 1e9, {}, {})["dram"] == pytest.approx(TOKENS * (DENSE - 45_000) / 1e9)


def test_a_copy_to_or_from_a_real_gpu_crosses_dram_once() -> None:
    moved = {"vram:0": 7000, "vram:0 to dram": 5000, "engram to vram:0": 999, "nvme": 400}
    run = run_with({"vram:0": 1}, moved, {"vram:0": DENSE}, "vram:0")
    bounds = run.bound_s(1e9, 1e9, {"vram:0": 50e9}, {"vram:0": 4e12})
    assert bounds["dram"] == pytest.approx((12_000 + CROSSINGS * 400) / 1e9)
    assert bounds["vram:0"] == pytest.approx(7000 / 50e9)


def test_beside_a_virtual_gpu_each_counts_as_what_it_is() -> None:
    moved = {"vram:0": 100, "vram:1": 1000}
    run = run_with({"vram:0": 10, "vram:1": 20, "dram": 30}, moved, {"vram:0": DENSE}, "vram:0")
    bounds = run.bound_s(1e9, 1e9, LINKS, {"vram:0": 4e12})
    assert bounds["dram"] == pytest.approx((50 * EXPERT + 100 + 2 * 1000) / 1e9)
    assert memory_of("vram:1") not in bounds


def test_two_gpus_read_from_two_memories() -> None:
    run = run_with({"vram:0": 10, "vram:1": 20}, {}, {"vram:0": 40_000, "vram:1": 20_000}, "vram:1")
    bounds = run.bound_s(1e9, 1e9, LINKS, MEMORIES)
    assert bounds["dram"] == 0.0
    assert bounds[memory_of("vram:0")] == pytest.approx((TOKENS * 40_000 + 10 * EXPERT) / 4e12)
    assert bounds[memory_of("vram:1")] == pytest.approx((TOKENS * 20_000 + 20 * EXPERT) / 1e12)


@pytest.mark.parametrize("head_gpu", [None, "vram:0"])
def test_while_the_head_is_read_the_other_memory_waits(head_gpu: str | None) -> None:
    on_gpu = DENSE if head_gpu else DENSE - HEAD
    run = run_with({"vram:0": 100, "dram": 900}, {}, {"vram:0": on_gpu}, head_gpu)
    bounds = run.bound_s(1e9, 1e9, LINKS, {"vram:0": 1e9})
    in_head, beside = TOKENS * HEAD / 1e9, memory_of("vram:0") if head_gpu else "dram"
    others = [seconds for name, seconds in bounds.items() if name != beside]
    assert run.ordered_bound_s(bounds) == pytest.approx(in_head + max(*others, bounds[beside] - in_head))
    assert run.ordered_bound_s(bounds) >= max(bounds.values())


def test_what_the_clock_adds_is_not_extrapolated() -> None:
    run = run_with({"vram:0": 1}, {}, {"vram:0": DENSE}, "vram:0")  # clocked tokens took twice as long
    assert run.like(1, 0) == pytest.approx(run.total_s / TOKENS)
    assert run.like(3, 0) == pytest.approx(2 * run.total_s / TOKENS)


@pytest.fixture(scope="module")
def slice_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slice") / "tiny"
    write_checkpoint(plan_slice("v41-tiny", 4, 2000), out, lambda done, total: None)
    return out


@pytest.mark.slow
def test_with_real_gpus_the_total_is_of_steps_that_no_clock_slows(
    slice_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 3
    waits: list[int] = []
    done: list[int] = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(len(done)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with pretend_gpus() as (gpu, _):
        budget = MemoryBudget(
            30_000_000,
            (Tier("vram:0", GPU_BASE_BYTES + 2_450_000, gpu, 40e9),),
            workload(tokens),
        )
        checkpoint = open_safetensors(slice_path)
        family, kernels = family_of(checkpoint), DeviceKernels(choose(), {gpu: OneGpu(gpu)})
        loaded = SimpleNamespace(
            model=family.load(checkpoint, kernels, budget), components=family.describe(checkpoint)[1]
        )
        monkeypatch.setattr(bench_slice, "load", lambda path, budget: loaded)
        run = run_slice(slice_path, budget, tokens, done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert set(waits) == {3, 4, 5}  # no step of the first three waited
    assert sum(run.counts.hits.values()) == tokens * 4 * 4
    assert run.head_gpu == "vram:0"
    assert run.gpu_bytes["vram:0"] == run.dense_bytes
    assert run.counts.computed["vram:0"] > 0
    bounds = run.bound_s(1e9, 1e9, {"vram:0": 1e9}, {"vram:0": 1e9})
    assert bounds[memory_of("vram:0")] > bounds["dram"]


def test_the_workload_has_room_for_the_clocked_tokens() -> None:
    longer = workload(64)
    assert longer.context == workload(32).context + 64
    assert longer.prefill_chunk == PROMPT_TOKENS
