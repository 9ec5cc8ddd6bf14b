"""Placements keep every budget, lose nothing, and put first what is read most."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.families.released import released_shape
from memory.hardware.profiles import HardwareProfile, load_profile, shipped
from memory.planner.cost_model import CostModel
from memory.planner.placement import NOWHERE, OF_SEQUENCES, Placement, Workload
from memory.planner.placing import plan
from memory.planner.published import built_in
from memory.planner.routing import UNIFORM
from memory.planner.shape import ModelShape, Weights
from tests.memory.planner.hardware_strategies import GB, GPU, MACHINE, machines, shapes, workloads

FLASH = released_shape("deepseek-v4-flash")
V41 = built_in("deepseek-v4.1-flash")


@given(shapes(), machines(), workloads)
def test_no_tier_is_over_its_budget(shape: ModelShape, machine: HardwareProfile, workload: Workload) -> None:
    placement = plan(shape, machine, workload)
    for tier, budget in placement.budgets.items():
        assert placement.used(tier) <= budget


@given(shapes(), machines(), workloads)
def test_every_byte_is_in_exactly_one_place(
    shape: ModelShape, machine: HardwareProfile, workload: Workload
) -> None:
    placement = plan(shape, machine, workload)
    placed = sum(place.nbytes for place in placement.places if place.kind not in OF_SEQUENCES)
    assert placed == shape.nbytes
    kv = sum(placement.kv_bytes().values()) - shape.kv_bytes(workload.context, workload.sequences)
    pages = workload.sequences * len(shape.layers) * max(gpu.page_bytes for gpu in (GPU, *machine.gpus))
    assert 0 <= kv <= pages, "rows in whole pages"
    for n, layer in enumerate(shape.layers):
        assert sum(placement.experts(n).values()) == layer.experts


@given(shapes(), machines(), workloads)
def test_what_fits_still_fits_with_more_memory(
    shape: ModelShape, machine: HardwareProfile, workload: Workload
) -> None:
    if plan(shape, machine, workload).fits:
        assert plan(shape, replace(machine, dram_bytes=2 * machine.dram_bytes), workload).fits
        gpus = tuple(replace(gpu, memory_bytes=2 * gpu.memory_bytes) for gpu in machine.gpus)
        assert plan(shape, replace(machine, gpus=gpus), workload).fits


@given(shapes(), machines(), workloads)
def test_layers_get_equally_many_of_the_fast_slots(
    shape: ModelShape, machine: HardwareProfile, workload: Workload
) -> None:
    placement = plan(shape, machine, workload)
    for is_fast in (lambda tier: tier.startswith("vram"), lambda tier: tier not in ("nvme", NOWHERE)):
        counts = [
            sum(count for tier, count in placement.experts(n).items() if is_fast(tier))
            for n in range(len(shape.layers))
        ]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", [name for name in shipped() if name != "cpu-24g"])
def test_dense_weights_kv_and_head_of_v41_are_on_the_gpus(name: str) -> None:
    placement = plan(V41, load_profile(name), Workload(32768, 8))
    assert placement.fits
    for place in placement.places:
        if place.kind in ("dense", "shared_experts", "kv", "head"):
            assert place.tier.startswith("vram")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(24, 80), min_size=2, max_size=3))
def test_cards_of_different_sizes_have_experts_in_proportion_to_what_they_bring(sizes: list[int]) -> None:
    machine = load_profile("2x4090-256g")
    gpus = tuple(replace(machine.gpus[0], memory_bytes=size * GB) for size in sizes)
    placement = plan(V41, replace(machine, gpus=gpus), Workload(8192, 1))
    tiers = [f"vram:{n}" for n in range(len(sizes))]
    held = {tier: sum(placement.experts(n).get(tier, 0) for n in range(40)) for tier in tiers}
    reserved = {tier: sum(r.nbytes for r in placement.reserves if r.tier == tier) for tier in tiers}
    rooms = {tier: placement.budgets[tier] - reserved[tier] for tier in tiers}
    for tier in tiers:
        assert placement.budgets[tier] - placement.used(tier) < V41.slot_nbytes, "all that it brings is used"
        share, room = held[tier] / sum(held.values()), rooms[tier] / sum(rooms.values())
        assert share == pytest.approx(room, abs=0.03)
        for n in range(40):
            assert placement.experts(n).get(tier, 0) == pytest.approx(held[tier] / 40, abs=3), (
                "as of any layer"
            )


def test_two_gpus_share_the_layers_and_the_experts_of_each() -> None:
    placement = plan(V41, load_profile("2x4090-256g"), Workload(8192, 1))
    tiers = [placement.tier_of("dense", n) for n in range(40)]
    assert tiers == sorted(tiers)
    assert {"vram:0", "vram:1"} == set(tiers)
    for n in range(40):
        held = placement.experts(n)
        assert abs(held["vram:0"] - held["vram:1"]) <= 3


def test_tables_move_to_dram_once_all_experts_are_there() -> None:
    small = plan(V41, load_profile("2x4090-256g"), Workload(8192, 1))
    large = plan(V41, replace(load_profile("2x4090-256g"), dram_bytes=600 * GB), Workload(8192, 1))
    assert [small.tier_of("engram", n) for n in (1, 14)] == ["nvme", "nvme"]
    assert any(reserve.name == "hot Engram rows" for reserve in small.reserves)
    assert [large.tier_of("engram", n) for n in (1, 14)] == ["dram", "dram"]
    assert not any(reserve.name == "hot Engram rows" for reserve in large.reserves)


def test_a_model_that_fits_on_the_gpus_leaves_dram_alone() -> None:
    gpus = tuple(replace(MACHINE.gpus[0], memory_bytes=120 * GB) for _ in range(2))
    placement = plan(FLASH, replace(MACHINE, gpus=gpus), Workload(8192, 1))
    in_dram = {place.kind for place in placement.places if place.tier == "dram"}
    assert in_dram == {"embedding", "look_ups"}


def test_unequal_gpus_share_experts_by_speed_where_both_have_room() -> None:
    slow, fast = (
        replace(MACHINE.gpus[0], memory_bytes=400 * GB, memory_bytes_per_s=speed)
        for speed in (0.5e12, 1.5e12)
    )
    held = plan(FLASH, replace(MACHINE, gpus=(slow, fast)), Workload(8192, 1)).experts(7)
    assert held == {"vram:0": 64, "vram:1": 192}


def test_a_gpu_too_small_for_its_workspace_is_left_out() -> None:
    tiny = replace(MACHINE, gpus=(replace(MACHINE.gpus[0], memory_bytes=GB // 10),))
    placement = plan(FLASH, tiny, Workload(8192, 1))
    assert placement.used("vram:0") == 0
    assert placement.fits


def test_layers_that_no_gpu_has_room_for_are_computed_from_dram() -> None:
    small = replace(MACHINE, gpus=(replace(MACHINE.gpus[0], memory_bytes=5 * GB),))
    placement = plan(FLASH, small, Workload(8192, 1))
    assert {placement.tier_of("dense", n) for n in range(43)} == {"vram:0", "dram"}
    assert placement.fits


def missing_kinds(placement: Placement) -> set[str]:
    return {place.kind for place in placement.places if place.tier == NOWHERE}


def test_a_disk_without_room_for_the_checkpoint_is_said() -> None:
    placement = plan(FLASH, replace(MACHINE, disk_bytes=100 * GB), Workload(8192, 1))
    assert not placement.fits
    assert missing_kinds(placement) == set()
    assert [reserve.name for reserve in placement.reserves if reserve.tier == NOWHERE] == ["checkpoint"]


@pytest.mark.parametrize("gigabytes", [9.5, 10.5, 40, 140, 200])
def test_an_embedding_makes_room_for_experts(gigabytes: float) -> None:
    placement = plan(FLASH, replace(MACHINE, dram_bytes=int(gigabytes * GB), gpus=()), Workload(8192, 1))
    assert placement.fits
    on_disk = {place.kind for place in placement.places if place.tier == "nvme"}
    assert on_disk == ({"embedding", "routed_experts"} if gigabytes < 150 else set())


def test_an_embedding_whose_rows_are_not_in_one_place_is_in_memory() -> None:
    packed = replace(FLASH, embedding_stays=False)
    machine = replace(MACHINE, dram_bytes=40 * GB, gpus=())
    placement = plan(packed, machine, Workload(8192, 1))
    assert placement.fits
    assert placement.tier_of("embedding", None) == "dram"
    fewer = placement.allocated()["dram"]["experts"]
    more = plan(FLASH, machine, Workload(8192, 1)).allocated()["dram"]["experts"]
    assert abs(more - fewer - FLASH.embedding.nbytes) < FLASH.slot_nbytes


@pytest.mark.parametrize(("kind", "copies"), [("cuda", 1), ("virtual", 0)])
def test_beside_a_head_on_a_card_the_host_has_the_embedding_that_it_is(kind: str, copies: int) -> None:
    tied = replace(FLASH, embedding=Weights(), tied=FLASH.embedding)
    gpu = replace(GPU, kind=kind)
    placement = plan(tied, replace(MACHINE, dram_bytes=300 * GB, gpus=(gpu,)), Workload(8192, 1))
    assert placement.tier_of("head", None) == "vram:0"
    held = [(place.tier, place.nbytes) for place in placement.places if place.kind == "embedding"]
    assert held == [("dram", FLASH.embedding.nbytes)] * copies
    without = plan(tied, replace(MACHINE, gpus=()), Workload(8192, 1))
    assert without.tier_of("embedding", None) == NOWHERE


def test_an_embedding_on_disk_makes_steps_faster_where_experts_are_there_too() -> None:
    machine = load_profile("2x4090-128g")
    placed = plan(V41, machine, Workload(32768, 8))
    assert placed.tier_of("embedding", None) == "nvme"
    # the same machine with the embedding in DRAM: so much less for experts
    less = replace(machine, dram_bytes=machine.dram_bytes - V41.embedding.nbytes)
    held = replace(V41, embedding=replace(V41.embedding, nbytes=0))
    before = CostModel(held, less, plan(held, less, Workload(32768, 8)), UNIFORM)
    after = CostModel(V41, machine, placed, UNIFORM)
    for sequences in (1, 8):
        assert after.decode(sequences, 8192).total_s < before.decode(sequences, 8192).total_s


def test_what_every_token_reads_must_not_lie_on_disk() -> None:
    placement = plan(FLASH, replace(MACHINE, dram_bytes=6 * GB, gpus=()), Workload(8192, 1))
    assert "dense" in missing_kinds(placement)


def test_what_weights_take_beyond_their_file_is_set_aside_where_they_lie() -> None:
    v3 = released_shape("deepseek-v3")
    more = sum(layer.decoded for layer in v3.layers)
    machine = load_profile("2x4090-256g")
    placed = plan(v3, machine, Workload(8192))
    aside = [reserve for reserve in placed.reserves if reserve.name == "decoded weights"]
    assert sum(reserve.nbytes for reserve in aside) == more > 3e9
    assert {reserve.tier for reserve in aside} == {p.tier for p in placed.places if p.kind == "dense"}
    plain = replace(v3, layers=tuple(replace(layer, decoded=0) for layer in v3.layers))
    experts = [
        sum(p.experts(n).get("nvme", 0) for n in range(61))
        for p in (placed, plan(plain, machine, Workload(8192)))
    ]
    assert experts[0] - experts[1] == pytest.approx(more / v3.expert_nbytes, abs=4)
