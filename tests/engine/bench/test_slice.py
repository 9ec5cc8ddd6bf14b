"""The slice benchmark accounts for all of a decode's time, bytes and memory."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from engine.bench.slice import SliceRun, run_slice
from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from memory.planner.budget import MemoryBudget

TOKENS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SliceRun:
    out = tmp_path_factory.mktemp("slice") / "tiny"
    write_checkpoint(plan_slice("v41-tiny", 4, 2000), out, lambda done, total: None)
    budget = MemoryBudget.of_this_machine("1900kB", "virtual:60kB@50MB/s")
    return run_slice(out, budget, TOKENS, lambda done: None, in_pause=lambda: time.sleep(0.01))


def test_times_by_kind_and_layer_add_up_to_the_whole(run: SliceRun) -> None:
    known = sum(sum(by_layer.values()) for by_layer in run.seconds.values())
    assert known == pytest.approx(run.clocked_s)  # pauses are in neither
    for kind in ("attention", "router", "experts"):
        assert sorted(run.seconds[kind]) == [0, 1, 2, 3]
    assert sorted(run.seconds["engram"]) == [1]


def test_every_choice_of_an_expert_is_counted_once(run: SliceRun) -> None:
    assert sum(run.counts.hits.values()) == TOKENS * 4 * 4
    assert run.counts.hits["nvme"] > 0
    assert run.computed_bytes == TOKENS * 4 * 4 * run.expert_bytes


def test_a_resource_twice_as_fast_bounds_half_as_tightly(run: SliceRun) -> None:
    slow = run.bound_s(1e9, 1e9, {"vram:0": 1e9})
    fast = run.bound_s(2e9, 1e9, {"vram:0": 1e9})
    assert fast["dram"] == pytest.approx(slow["dram"] / 2)
    assert fast["nvme"] == slow["nvme"] > 0


def test_in_order_no_token_is_faster_than_without(run: SliceRun) -> None:
    bounds = run.bound_s(1e9, 1e9, {"vram:0": 1e9})
    assert run.ordered_bound_s(bounds) >= max(bounds.values())
    idle_disk = {**bounds, "nvme": 0.0, "vram:0": 0.0}
    assert run.ordered_bound_s(idle_disk) == pytest.approx(bounds["dram"])


def test_a_disk_that_was_not_needed_bounds_nothing(run: SliceRun) -> None:
    idle = replace(run.counts, moved_bytes={}, busy_s={"nvme": 0.0}, hits={"dram": 1}, prefetches={})
    assert replace(run, counts=idle).bound_s(1e9, 1e9, {"vram:0": 1e9})["nvme"] == 0


def test_weights_stay_within_their_budgets(run: SliceRun) -> None:
    assert run.tier_bytes["dram"] <= 1_900_000
    assert run.tier_bytes["vram:0"] <= 60_000


def test_more_layers_are_expected_to_take_longer(run: SliceRun) -> None:
    assert run.like(40, 2) > run.like(4, 1) > 0
