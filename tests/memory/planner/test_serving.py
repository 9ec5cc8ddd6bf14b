"""What a server takes of a machine: as much as makes sense, with a reason for each choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from memory.hardware.profiles import HardwareProfile, load_profile, parse_bytes
from memory.planner.placement import NOWHERE
from memory.planner.published import built_in
from memory.planner.serving import Asked, bytes_of_one, chosen_gpus, memory_bytes, serving_plan
from memory.planner.shape import ModelShape
from quant.errors import BudgetError
from tests.memory.planner.hardware_strategies import GB, MACHINE, machines, shapes

V41 = built_in("deepseek-v4.1-flash")


@settings(max_examples=15, deadline=None)
@given(shapes(), machines())
def test_a_model_that_can_be_served_at_all_fits_as_chosen(
    shape: ModelShape, machine: HardwareProfile
) -> None:
    machine = replace(machine, disk_bytes=10_000 * GB)
    found = serving_plan(shape, machine, Asked(chunk=64))
    one = bytes_of_one(shape, machine, 512)
    least = Asked(context=512, sequences=1, chunk=64, prefix_bytes=0, kv_bytes=one)
    assert found.placement.fits or not serving_plan(shape, machine, least).placement.fits
    for tier, budget in found.placement.budgets.items():
        assert found.placement.used(tier) <= budget
    assert found.workload.context <= shape.max_context


@settings(max_examples=15, deadline=None)
@given(shapes(), machines())
def test_every_choice_has_a_reason_and_what_was_set_is_no_choice(
    shape: ModelShape, machine: HardwareProfile
) -> None:
    found = serving_plan(shape, machine, Asked())
    assert all(choice.value and choice.why for choice in found.choices)
    names = {choice.setting for choice in found.choices}
    assert names == {"max_num_seqs", "kv_budget", "max_model_len", "prefix_cache", "prefill_chunk"}
    asked = Asked(context=4096, sequences=3, chunk=256, kv_bytes=GB, prefix_bytes=GB // 2)
    kept = serving_plan(shape, machine, asked)
    assert kept.choices == ()
    assert (kept.workload.sequences, kept.workload.prefill_chunk) == (3, 256)


@settings(max_examples=15, deadline=None)
@given(shapes(), machines())
def test_choices_say_what_the_plan_took(shape: ModelShape, machine: HardwareProfile) -> None:
    for dram_bytes in (machine.dram_bytes, memory_bytes(shape) // 2 + 2 * GB):  # the second: hardly anything
        found = serving_plan(shape, replace(machine, dram_bytes=dram_bytes, gpus=()), Asked())
        chosen = {choice.setting: choice.value for choice in found.choices}
        work = found.workload
        assert chosen["max_num_seqs"] == f"{work.sequences}"
        assert chosen["max_model_len"] == f"{work.context}"  # as flags take them
        assert chosen["prefill_chunk"] == f"{work.prefill_chunk}"
        assert (chosen["prefix_cache"] == "0") == (work.prefix_bytes == 0)


def test_a_plan_that_is_as_small_as_makes_sense_says_so() -> None:
    tight = replace(MACHINE, gpus=(), dram_bytes=10 * GB)
    found = serving_plan(V41, tight, Asked())
    assert (found.workload.sequences, found.workload.prefix_bytes) == (1, 0)
    reasons = {choice.setting: choice.why for choice in found.choices}
    assert set(reasons) == {"max_num_seqs", "kv_budget", "max_model_len", "prefix_cache", "prefill_chunk"}
    assert "as little as makes sense" in reasons["max_num_seqs"]
    asked = serving_plan(V41, tight, Asked(sequences=1, prefix_bytes=1))
    assert {"max_num_seqs", "prefix_cache"}.isdisjoint(choice.setting for choice in asked.choices)


def test_a_small_model_has_its_whole_context_and_as_many_sequences_as_are_recorded() -> None:
    small = replace(V41, layers=V41.layers[:2], max_context=8192)
    work = serving_plan(small, replace(MACHINE, gpus=()), Asked()).workload
    assert (work.context, work.sequences) == (8192, 16)


def test_weights_that_leave_little_memory_leave_a_pool_all_the_same() -> None:
    machine = load_profile("2x4090-128g")
    found = serving_plan(V41, replace(machine, gpus=()), Asked())
    assert found.placement.fits
    kv = sum(found.placement.kv_bytes().values())
    assert 0.02 * machine.dram_bytes < kv < 0.15 * machine.dram_bytes
    held = found.placement.allocated()["dram"]["experts"]
    assert held > 0.7 * machine.dram_bytes


def test_a_pool_without_room_for_a_sequence_is_refused_with_one_that_has() -> None:
    with pytest.raises(BudgetError, match=r"no room for a sequence; raise --kv-budget to (\d+MiB)") as caught:
        serving_plan(V41, MACHINE, Asked(kv_bytes=1000))
    enough = parse_bytes(str(caught.value).rpartition(" ")[2])
    assert serving_plan(V41, MACHINE, Asked(kv_bytes=enough)).workload.context >= 512


def test_pools_that_are_not_shared_are_refused_with_room_for_all_sequences() -> None:
    with pytest.raises(BudgetError, match="no room for 4 sequences; raise --kv-budget to") as caught:
        serving_plan(V41, MACHINE, Asked(kv_bytes=1000, sequences=4), pools=False)
    enough = parse_bytes(str(caught.value).rpartition(" ")[2])
    found = serving_plan(V41, MACHINE, Asked(kv_bytes=enough, sequences=4), pools=False)
    assert found.workload.context >= 512


def test_a_pool_too_small_for_pages_of_cards_is_one_of_the_host() -> None:
    machine = replace(MACHINE, dram_bytes=700 * GB, gpus=MACHINE.gpus[:1])
    asked = Asked(kv_bytes=bytes_of_one(V41, replace(machine, gpus=()), 512))
    with pytest.raises(BudgetError, match="no room for a sequence"):
        serving_plan(V41, machine, asked)
    chosen, why = chosen_gpus(V41, machine, asked)
    assert chosen == ()
    assert why.endswith("; with 1 the KV pool asked for holds no sequence")
    with pytest.raises(BudgetError, match="raise --kv-budget"):
        chosen_gpus(V41, machine, Asked(kv_bytes=1000))


def test_two_cards_are_used_where_they_help() -> None:
    chosen, why = chosen_gpus(V41, load_profile("2x4090-256g"), Asked(context=8192))
    assert chosen == (0, 1)
    assert why.count("tok/s") == 3


@pytest.mark.parametrize(("free_gib", "of_use"), [((0.4, 23), 1), ((23, 0.4), 0)])
def test_a_card_without_room_does_not_hide_another(free_gib: tuple[float, float], of_use: int) -> None:
    machine = load_profile("2x4090-256g")
    gpus = tuple(
        replace(gpu, memory_bytes=int(size * 2**30)) for gpu, size in zip(machine.gpus, free_gib, strict=True)
    )
    chosen, why = chosen_gpus(V41, replace(machine, gpus=gpus), Asked(context=8192))
    assert chosen == (of_use,)
    assert why.endswith(f"; nothing would lie on GPU {1 - of_use}")


def test_a_card_that_makes_steps_slower_is_left_alone() -> None:
    slow = replace(MACHINE.gpus[0], memory_bytes_per_s=1e9, matmul_flops=1e10)
    machine = replace(
        MACHINE, gpus=(slow,), dram_bytes=700 * GB, dram_bytes_per_s=400e9, expert_bytes_per_s=390e9
    )
    assert chosen_gpus(V41, machine, Asked(context=8192))[0] == ()


@pytest.mark.parametrize(("gigabytes", "fits"), [(7, False), (40, True)])
def test_a_machine_without_room_for_what_every_token_reads_is_too_small(gigabytes: int, fits: bool) -> None:
    machine = replace(MACHINE, gpus=(), dram_bytes=gigabytes * GB)
    found = serving_plan(V41, machine, Asked())
    assert found.placement.fits == fits
    assert bool(found.placement.used(NOWHERE)) != fits


def test_memory_of_slots_counts_instead_of_files() -> None:
    larger = replace(V41, slot_bytes=2 * V41.expert_nbytes)
    experts = sum(layer.experts for layer in V41.layers)
    assert memory_bytes(larger) - memory_bytes(V41) == experts * V41.expert_nbytes
