"""Prompts in chunks: how large they should be, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.families.released import released_shape
from memory.experts.streaming import split
from memory.hardware.profiles import HardwareProfile, load_profile, parse_devices
from memory.planner.cost_model import DISK, StepCost
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.prefill import PrefillModel, _divided, planned_chunk
from memory.planner.published import built_in
from memory.planner.routing import SKEWED, UNIFORM
from memory.planner.workspace import lent_bytes, workspace_bytes

V41 = built_in("deepseek-v4.1-flash")
WORKLOAD = Workload(32_768, 8)


@pytest.mark.parametrize(("machine", "tokens_per_s"), [("2x4090-256g", 1200), ("2x4090-128g", 700)])
def test_a_prompt_of_32k_is_as_fast_as_promised(machine: str, tokens_per_s: float) -> None:
    hardware = load_profile(machine)
    chunk = planned_chunk(V41, hardware, WORKLOAD)
    placement = plan(V41, hardware, replace(WORKLOAD, prefill_chunk=chunk))
    for routing in (UNIFORM, SKEWED):
        cost = PrefillModel(V41, hardware, placement, routing).prefill(chunk, WORKLOAD.context)
        assert cost.tokens == WORKLOAD.context
        assert cost.tokens_per_s >= tokens_per_s


def test_a_large_chunk_leaves_decoding_its_experts() -> None:
    hardware = load_profile("2x4090-256g")
    chunk = planned_chunk(V41, hardware, WORKLOAD)
    assert chunk > 512
    small, large = (plan(V41, hardware, replace(WORKLOAD, prefill_chunk=n)) for n in (512, chunk))
    assert small.experts(0) == large.experts(0)


def test_the_chunk_is_as_large_as_pays_and_no_larger() -> None:
    fits_in_vram = planned_chunk(released_shape("qwen3-30b-a3b"), load_profile("5090-256g"), WORKLOAD)
    streams = planned_chunk(V41, load_profile("2x4090-256g"), WORKLOAD)
    assert 512 <= fits_in_vram < streams
    assert planned_chunk(V41, load_profile("2x4090-256g"), Workload(300)) == 300


def test_what_a_chunk_is_computed_with_does_not_depend_on_the_context() -> None:
    for tokens in (512, 16_384):
        assert len({workspace_bytes(V41, Workload(context, 1, tokens)) for context in (1024, 500_000)}) == 1
    assert lent_bytes(V41, Workload(32_768, 1, 512)) == 0
    per_token = lent_bytes(V41, Workload(32_768, 1, 1024)) / 512
    assert per_token == V41.held_bytes < V41.activation_bytes


def test_a_prompt_is_read_from_disk_once_a_chunk() -> None:
    hardware = load_profile("2x4090-128g")
    costs = PrefillModel(V41, hardware, plan(V41, hardware, WORKLOAD), UNIFORM)
    one, two = costs.prefill(8192, 8192), costs.prefill(8192, 16_384)
    early = sum(layer.tail is None for layer in V41.layers)
    assert one.bound == DISK
    assert two.nbytes["nvme"] - one.nbytes["nvme"] == pytest.approx(one.nbytes["nvme"] * early / 40, rel=0.05)


def test_a_prompts_forecast_changes_nothing_for_a_step_asked_for_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hardware = load_profile("2x4090-128g")
    costs = PrefillModel(V41, hardware, plan(V41, hardware, WORKLOAD), UNIFORM)
    alone, meanwhile = costs.decode(1, 1000), list[StepCost]()
    whole = PrefillModel._chunk

    def chunk(self: PrefillModel, *arguments: Any) -> StepCost:
        meanwhile.append(costs.decode(1, 1000))
        return whole(self, *arguments)

    monkeypatch.setattr(PrefillModel, "_chunk", chunk)
    costs.prefill(8192, 16_384)
    assert meanwhile == [alone] * len(meanwhile) != []


SLOW_DISK = HardwareProfile(
    name="two cores", description="", cores=2, cpu_level="avx512", cpu_matmul_flops=250e9,
    expert_bytes_per_s=33e9, dram_bytes=40 << 30, dram_bytes_per_s=35e9, dram_rows_per_s=1e7,
    disk_bytes=1 << 40, disk_bytes_per_s=1e9, disk_reads_per_s=1e5,
)  # fmt: skip


def seconds(machine: HardwareProfile, chunk: int) -> float:
    placement = plan(V41, machine, Workload(8192, 1, chunk))
    return PrefillModel(V41, machine, placement, UNIFORM).prefill(chunk, 8192).total_s


def test_what_the_processor_does_beside_expert_products_counts() -> None:
    fast_disk = replace(SLOW_DISK, disk_bytes_per_s=1e12)
    slow_dense = replace(fast_disk, cpu_fp8_flops=150e9)
    slow_order = replace(fast_disk, rearranged_per_core=1e9)
    assert seconds(fast_disk, 512) < seconds(slow_dense, 512)
    assert seconds(fast_disk, 512) < seconds(slow_order, 512)
    # what is read once a chunk is rearranged once a chunk
    more = [seconds(slow_order, chunk) - seconds(fast_disk, chunk) for chunk in (512, 4096)]
    assert more[1] < more[0] / 4
    virtual = replace(fast_disk, dram_bytes=20 << 30).with_devices(parse_devices("virtual:20GiB@12.5GB/s"))
    assert seconds(fast_disk, 512) < seconds(virtual, 512)


def test_memory_that_weights_may_not_have_allows_larger_chunks() -> None:
    small = replace(SLOW_DISK, dram_bytes=20 << 30)
    full = planned_chunk(V41, small, Workload(8192))
    assert full < planned_chunk(V41, small, Workload(8192, weights_bytes=10 << 30))
    assert workspace_bytes(V41, Workload(8192, 1, full)) <= small.dram_bytes / 16


@given(
    st.lists(st.floats(0.001, 10), min_size=1, max_size=40),
    st.floats(0.001, 10),
)
def test_the_plan_divides_experts_as_the_engine_does(costs: list[float], sending_s: float) -> None:
    costs = sorted(costs)
    count = split(costs, sending_s)
    real = max(sum(costs[:count]), (len(costs) - count) * sending_s)
    hottest_first = np.array(costs[::-1])
    by_cpu, by_links, sent, _ = _divided(
        hottest_first, np.full(len(costs), sending_s), np.ones(len(costs)), 0.0, 0.0, np.zeros(len(costs) + 1)
    )
    planned = max(by_cpu, by_links)
    assert planned <= real * (1 + 1e-9)
    assert real <= planned + max(sending_s, costs[-1])
    assert sent == pytest.approx(by_links)
