"""What steps cost: never less than bytes and bandwidths allow, and never more with more of anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.families.released import released_shape
from memory.hardware.profiles import HardwareProfile, load_profile, parse_devices
from memory.planner.cost_model import CPU, DISK, DRAM, LATENCY, LINK, VRAM, Efficiency, StepCost
from memory.planner.placement import STAGING, Workload
from memory.planner.placing import plan
from memory.planner.prefill import PrefillModel
from memory.planner.published import built_in
from memory.planner.routing import SKEWED, UNIFORM, Routing
from memory.planner.shape import ModelShape, Weights
from tests.memory.planner.hardware_strategies import GB, MACHINE, machines, shapes, workloads

RELEASED = released_shape("deepseek-v4-flash")
# Its operations are started one by one, so that links bring experts to the GPUs.
FLASH = replace(RELEASED, layers=tuple(replace(layer, launches=None) for layer in RELEASED.layers))
V41 = built_in("deepseek-v4.1-flash")
IDEAL = Efficiency(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e18, 0.0, 0.0, 0.0)
BLIND = replace(Efficiency(), guessed_share=0.0)


def model(
    shape: ModelShape,
    machine: HardwareProfile,
    workload: Workload | None = None,
    routing: Routing = UNIFORM,
    efficiency: Efficiency | None = None,
) -> PrefillModel:
    placement = plan(shape, machine, workload or Workload(8192, 1))
    return PrefillModel(shape, machine, placement, routing, efficiency)


@given(shapes(), machines(), workloads, st.sampled_from([UNIFORM, SKEWED]))
def test_no_step_is_faster_than_any_tier_can_deliver(
    shape: ModelShape, machine: HardwareProfile, workload: Workload, routing: Routing
) -> None:
    costs = model(shape, machine, workload, routing)
    assume(costs.placement.fits)
    for cost in (costs.decode(workload.sequences, 1000), costs.prefill(workload.prefill_chunk, 1000)):
        assert cost.total_s >= cost.nbytes.get("dram", 0) / machine.dram_bytes_per_s * (1 - 1e-9)
        tables = [layer.table for layer in shape.layers if layer.table]
        rows = sum(table.rows_per_token * table.row_bytes * cost.tokens for table in tables)
        assert cost.total_s >= (cost.nbytes.get("nvme", 0) - rows) / machine.disk_bytes_per_s * (1 - 1e-9)
        for i, gpu in enumerate(machine.gpus):
            assert cost.total_s >= cost.nbytes.get(f"vram:{i}", 0) / gpu.memory_bytes_per_s * (1 - 1e-9)
            assert cost.total_s >= cost.nbytes.get(f"link:{i}", 0) / gpu.link_bytes_per_s * (1 - 1e-9)


@given(shapes(), machines(), workloads, st.sampled_from([UNIFORM, SKEWED]))
def test_hit_rates_of_the_tiers_add_up(
    shape: ModelShape, machine: HardwareProfile, workload: Workload, routing: Routing
) -> None:
    costs = model(shape, machine, workload, routing)
    assume(costs.placement.fits)
    assert sum(costs.decode(1, 10).hit_rates.values()) == pytest.approx(1.0)


FASTER = {
    "DRAM bandwidth": lambda m: replace(m, dram_bytes_per_s=2 * m.dram_bytes_per_s),
    "CPU arithmetic": lambda m: replace(m, cpu_matmul_flops=2 * m.cpu_matmul_flops),
    "disk": lambda m: replace(m, disk_bytes_per_s=2 * m.disk_bytes_per_s),
    "VRAM bandwidth": lambda m: replace(
        m, gpus=tuple(replace(g, memory_bytes_per_s=2 * g.memory_bytes_per_s) for g in m.gpus)
    ),
    "GPU arithmetic": lambda m: replace(
        m, gpus=tuple(replace(g, matmul_flops=2 * g.matmul_flops) for g in m.gpus)
    ),
    "links": lambda m: replace(
        m,
        gpus=tuple(replace(g, link_together_bytes_per_s=2 * g.link_together_bytes_per_s) for g in m.gpus),
    ),
    "DRAM size": lambda m: replace(m, dram_bytes=2 * m.dram_bytes),
}


@settings(max_examples=40)
@given(shapes(), machines(), workloads, st.sampled_from([UNIFORM, SKEWED]), st.sampled_from(list(FASTER)))
def test_more_of_anything_never_makes_a_step_slower(
    shape: ModelShape, machine: HardwareProfile, workload: Workload, routing: Routing, resource: str
) -> None:
    before = model(shape, machine, workload, routing)
    assume(before.placement.fits)
    after = model(shape, FASTER[resource](machine), workload, routing)
    # Places are chosen for the step of all sequences: one sequence alone may be slower with better ones.
    stays = after.placement == before.placement
    for step in steps(workload) if stays else steps(workload)[1:2]:
        assert step(after).total_s <= step(before).total_s * (1 + 1e-8)


@settings(max_examples=60)
@given(shapes(), machines(), workloads, st.sampled_from([UNIFORM, SKEWED]))
def test_more_vram_makes_nothing_slower_than_the_cpus_lost_help(
    shape: ModelShape, machine: HardwareProfile, workload: Workload, routing: Routing
) -> None:
    assume(machine.gpus)
    before = model(shape, machine, workload, routing)
    assume(before.placement.fits)
    gpus = tuple(replace(gpu, memory_bytes=2 * gpu.memory_bytes) for gpu in machine.gpus)
    after = model(shape, replace(machine, gpus=gpus), workload, routing)
    e = Efficiency()
    help_of_cpu = machine.dram_bytes_per_s * e.bus_share / (gpus[0].memory_bytes_per_s * e.vram_share)
    times = [m.decode(workload.sequences, workload.context).total_s for m in (before, after)]
    starting = sum(  # layers on a GPU, where none may have been before
        e.gpu_layer_s + e.round_trip_s if n.launches is None else n.launches * e.launch_s + e.hand_over_s
        for n in shape.layers
    )
    assert times[1] <= times[0] * (1 + help_of_cpu) + len(shape.layers) * e.gpu_hop_s + starting


def test_another_gpus_part_of_a_layer_is_done_beside_what_the_processor_does() -> None:
    """On two RTX 4090, the processor reads experts from DRAM far longer than GPUs need to meet."""
    machine = load_profile("2x4090-256g")
    layers = len(V41.layers)
    apart, soon, late = (
        model(V41, machine, Workload(8192, 8), SKEWED, replace(Efficiency(), exchange_s=seconds)).decode(
            1, 4096
        )
        for seconds in (0.0, 10e-6, 5e-3)
    )
    assert soon.total_s == pytest.approx(apart.total_s)
    assert late.total_s > soon.total_s + 0.7 * layers * 5e-3
    assert soon.tokens_per_s >= 16
    exchanged = 4 * V41.hidden * layers  # each layer's input, and an output for each of some choices
    assert exchanged < soon.nbytes["link:0"] == soon.nbytes["link:1"] < exchanged * (1 + V41.top_k)


def steps(workload: Workload) -> list[Callable[[PrefillModel], StepCost]]:
    return [
        lambda m: m.decode(1, workload.context),
        lambda m: m.decode(workload.sequences, workload.context),
        lambda m: m.prefill(workload.prefill_chunk, workload.context),
    ]


def test_decoding_from_dram_alone_is_bytes_over_bandwidth() -> None:
    machine = replace(MACHINE, gpus=(), dram_bytes=400 * GB, cpu_matmul_flops=1e18)
    cost = model(FLASH, machine, efficiency=IDEAL).decode(1, 0)
    experts = sum(FLASH.top_k * layer.expert.nbytes for layer in FLASH.layers)
    dense = sum((layer.dense + layer.shared).nbytes + layer.kv.read_bytes(0) for layer in FLASH.layers)
    assert cost.nbytes["dram"] == pytest.approx(experts + dense + FLASH.head.nbytes)
    assert cost.total_s == pytest.approx(cost.nbytes["dram"] / machine.dram_bytes_per_s)
    assert cost.bound == DRAM


def test_cpu_and_link_share_what_lies_in_dram_so_that_both_finish_together() -> None:
    machine = replace(MACHINE, dram_bytes=400 * GB, dram_bytes_per_s=1e12, expert_bytes_per_s=60e9)
    cost = model(FLASH, machine).decode(1, 0)
    by_link, total = cost.nbytes["link:0"], cost.nbytes["dram"]
    assert by_link / machine.gpus[0].link_together_bytes_per_s == pytest.approx((total - by_link) / 60e9)


def test_the_dram_bus_limits_what_cpu_and_link_do_together() -> None:
    machine = replace(MACHINE, dram_bytes=400 * GB)
    cost = model(FLASH, machine, efficiency=replace(Efficiency(), gpu_layer_s=0.0)).decode(1, 0)
    assert cost.bound == DRAM
    assert cost.seconds[DRAM] == pytest.approx(cost.nbytes["dram"] / (80e9 * Efficiency().bus_share))


def test_experts_on_disk_are_waited_for() -> None:
    machine = replace(MACHINE, dram_bytes=20 * GB)
    cost = model(FLASH, machine, efficiency=BLIND).decode(1, 0)
    assert cost.bound == DISK
    assert cost.seconds[DISK] == pytest.approx(cost.nbytes["nvme"] / machine.disk_bytes_per_s, rel=1e-3)


def test_what_is_guessed_right_is_read_while_the_layer_before_is_computed() -> None:
    machine = replace(MACHINE, dram_bytes=20 * GB)
    blind, guessing = (
        model(FLASH, machine, efficiency=e).decode(1, 0).total_s for e in (BLIND, Efficiency())
    )
    assert guessing < blind
    one_layer = replace(FLASH, layers=FLASH.layers[:1])
    costs = [model(one_layer, machine, efficiency=e).decode(1, 0).total_s for e in (BLIND, Efficiency())]
    assert costs[0] == costs[1]


def test_layers_that_lack_experts_unevenly_wait_for_more_than_their_mean() -> None:
    machine = replace(MACHINE, gpus=(), dram_bytes=140 * GB)  # few are on disk: computing takes as long
    costs = model(FLASH, machine)
    step = costs.decode(1, 0)
    read_s = step.nbytes["nvme"] / machine.disk_bytes_per_s
    all_there = replace(machine, dram_bytes=400 * GB)
    computing_s = model(FLASH, all_there).decode(1, 0).total_s
    assert max(read_s, computing_s) < step.total_s < read_s + computing_s


def test_slots_for_experts_on_their_way_are_looked_into_too() -> None:
    machine = replace(MACHINE, gpus=(), dram_bytes=20 * GB)
    placement = plan(FLASH, machine, Workload(8192, 1))
    held = sum(placement.experts(n).get("dram", 0) for n in range(43))
    staged = sum(r.nbytes for r in placement.reserves if r.name == STAGING) // FLASH.slot_nbytes
    assert staged == 12
    found = model(FLASH, machine).decode(1, 0).hit_rates["dram"]
    assert found == pytest.approx((held + staged) / (43 * 256))


def test_an_embedding_on_disk_costs_a_read_for_a_token_and_little_more_for_many() -> None:
    machine = replace(MACHINE, gpus=(), dram_bytes=20 * GB, disk_reads_per_s=1e6)
    placement = plan(FLASH, machine, Workload(8192, 1))
    assert placement.tier_of("embedding", None) == "nvme"
    read_s = Efficiency().disk_read_s

    def waits(tokens: int) -> float:
        costs = PrefillModel(FLASH, machine, placement, UNIFORM)
        free = PrefillModel(FLASH, machine, placement, UNIFORM, replace(Efficiency(), disk_read_s=0.0))
        return costs.prefill(tokens, tokens).total_s - free.prefill(tokens, tokens).total_s

    assert waits(1) == pytest.approx(read_s)
    assert waits(512) == pytest.approx(read_s)


def test_a_slow_processor_is_kept_busy_by_rearranging_what_it_reads() -> None:
    machine = replace(MACHINE, dram_bytes=20 * GB, gpus=(), cores=1, disk_bytes_per_s=1e12)
    slow = replace(Efficiency(), rearranged_per_core=1e9)
    cost = model(FLASH, machine, efficiency=slow).decode(1, 0)
    assert cost.total_s > cost.nbytes["nvme"] / 1e9


def test_prompts_amortise_what_is_read_once_a_chunk() -> None:
    machine = load_profile("4090-128g")
    speeds = [
        model(V41, machine, Workload(8192, 1, chunk)).prefill(chunk, 8192).tokens_per_s
        for chunk in (128, 512, 2048)
    ]
    assert speeds == sorted(speeds)
    assert speeds[2] > 3 * speeds[0]


def test_sequences_together_cost_less_than_one_after_the_other() -> None:
    costs = model(V41, load_profile("2x4090-256g"), Workload(8192, 8), SKEWED)
    assert costs.decode(8, 4096).total_s < 8 * costs.decode(1, 4096).total_s


def test_a_long_context_costs_time_and_a_longer_one_more() -> None:
    costs = model(released_shape("deepseek-v3"), replace(MACHINE, dram_bytes=800 * GB), Workload(100_000, 1))
    times = [costs.decode(1, held).total_s for held in (0, 10_000, 100_000)]
    assert times == sorted(set(times))


def test_engram_rows_from_disk_are_hidden_behind_the_layers_before() -> None:
    slow = replace(load_profile("2x4090-256g"), disk_reads_per_s=1000.0)
    fast = load_profile("2x4090-256g")
    waiting = model(V41, slow).decode(1, 0).total_s - model(V41, fast).decode(1, 0).total_s
    rows_of_two_tables = 48 / 1000.0
    assert 0 < waiting < rows_of_two_tables


def test_a_virtual_gpu_costs_the_cpu_what_it_computes() -> None:
    plain = replace(MACHINE, gpus=(), dram_bytes=200 * GB)
    virtual = plain.with_devices(parse_devices("virtual:24GB@12.5GB/s,virtual:24GB@12.5GB/s"))
    a, b = (model(FLASH, machine).decode(1, 0) for machine in (plain, virtual))
    assert b.total_s == pytest.approx(a.total_s, rel=0.01)
    assert b.nbytes["vram:0"] > 0
    assert VRAM not in b.seconds
    assert LINK not in b.seconds


def test_layers_on_the_cpu_cost_their_calls_even_when_tiny() -> None:
    layer = replace(FLASH.layers[0], dense=Weights(1000, 1000), shared=Weights(), experts=0)
    cost = model(replace(FLASH, layers=(layer,) * 4), replace(MACHINE, gpus=())).decode(1, 0)
    assert cost.seconds[LATENCY] == pytest.approx(4 * layer.operations * Efficiency().operation_s)


def test_prompts_and_large_batches_are_not_recorded() -> None:
    layer = replace(FLASH.layers[0], dense=Weights(1000, 1000), shared=Weights(), experts=0)
    costs = model(replace(FLASH, layers=(layer,)), replace(MACHINE, gpus=()))
    for step in (costs.decode(17, 0), costs.prefill(64, 64)):
        assert step.seconds[LATENCY] == pytest.approx(Efficiency().host_layer_s)
    assert costs.decode(16, 0).seconds[LATENCY] < Efficiency().host_layer_s


def test_slow_processors_are_bound_by_arithmetic_on_prompts() -> None:
    slow = replace(MACHINE, gpus=(), dram_bytes=400 * GB, cpu_matmul_flops=50e9)
    assert model(FLASH, slow).prefill(512, 512).bound == CPU


def test_a_step_is_the_sum_of_its_parts() -> None:
    cost = StepCost(8, {DRAM: 0.03, LATENCY: 0.01}, {"dram": 1.0})
    assert cost.total_s == pytest.approx(0.04)
    assert cost.tokens_per_s == pytest.approx(200)
    assert cost.bound == DRAM


def test_layers_that_compute_a_prompts_end_alone_cost_what_that_takes() -> None:
    machine = load_profile("2x4090-256g")
    whole = replace(V41, layers=tuple(replace(layer, tail=None) for layer in V41.layers))
    costs, all_of_it = model(V41, machine), model(whole, machine)
    early = sum(layer.tail is None for layer in V41.layers)
    assert early == 20
    assert costs.prefill(128, 128).total_s == pytest.approx(all_of_it.prefill(128, 128).total_s)
    gain = all_of_it.prefill(512, 1 << 20).total_s / costs.prefill(512, 1 << 20).total_s
    assert gain == pytest.approx(len(V41.layers) / early, rel=0.05)
    tails = [layer.tail for layer in V41.layers if layer.tail is not None]
    assert (tails[0], tails[-1]) == (128 + 127 * 19 + 16, 128 + 16)
