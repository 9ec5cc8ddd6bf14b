"""What a plan promises, what would help, and how to make a model fit that doesn't."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from engine.families.released import released_shape
from memory.hardware.profiles import HardwareProfile, load_profile
from memory.planner.forecast import doublings, forecast, remedy
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.published import built_in
from memory.planner.routing import SKEWED, UNIFORM
from tests.memory.planner.hardware_strategies import GB, MACHINE

V41 = built_in("deepseek-v4.1-flash")
V32 = released_shape("deepseek-v3.2")


def test_skewed_routing_is_never_slower_than_uniform() -> None:
    workload, machine = Workload(32768, 8), load_profile("2x4090-256g")
    uniform, skewed = (forecast(V41, machine, workload, routing) for routing in (UNIFORM, SKEWED))
    for step in ("alone", "together", "prefill"):
        assert getattr(skewed, step).tokens_per_s >= getattr(uniform, step).tokens_per_s


def test_the_resource_that_bounds_decoding_is_the_one_whose_doubling_helps() -> None:
    workload, machine = Workload(8192, 4), load_profile("4090-128g")
    assert forecast(V41, machine, workload, UNIFORM).alone.bound == "disk"
    gains = {gain.resource: gain for gain in doublings(V41, machine, workload, UNIFORM)}
    assert max(gains.values(), key=lambda gain: gain.alone).resource in ("disk speed", "DRAM size")
    assert gains["disk speed"].alone > 1.2
    assert gains["PCIe links"].alone == pytest.approx(1.0, abs=0.01)


def test_machines_without_gpus_are_not_offered_faster_gpus() -> None:
    resources = {
        gain.resource for gain in doublings(V41, replace(MACHINE, gpus=()), Workload(8192, 1), SKEWED)
    }
    assert resources == {"DRAM size", "DRAM bandwidth", "CPU arithmetic", "disk speed", "prefill chunk"}


def amount(text: str) -> int:
    found = re.search(r"([0-9.]+) GB more", text)
    assert found, text
    return int(float(found.group(1)) * GB)


def lacking_memory() -> tuple[HardwareProfile, Workload]:
    return replace(MACHINE, dram_bytes=14 * GB, gpus=()), Workload(32768, 4, 512)


def test_each_option_of_a_remedy_is_enough_and_a_little_less_is_not() -> None:
    machine, workload = lacking_memory()
    assert not plan(V32, machine, workload).fits
    mend = remedy(V32, machine, workload)
    assert mend.required == ()
    (dram,) = (option for option in mend.options if "DRAM" in option)
    enough = replace(machine, dram_bytes=machine.dram_bytes + amount(dram))
    assert plan(V32, enough, workload).fits
    assert not plan(V32, replace(enough, dram_bytes=enough.dram_bytes - GB), workload).fits


def test_a_shorter_context_is_offered_where_kv_is_what_does_not_fit() -> None:
    machine = replace(MACHINE, dram_bytes=26 * GB, gpus=())
    workload = Workload(131072, 1)
    (context,) = (option for option in remedy(V32, machine, workload).options if "context" in option)
    shorter = int(context.split()[3])
    assert plan(V32, machine, replace(workload, context=shorter)).fits
    assert not plan(V32, machine, replace(workload, context=shorter + 1)).fits


def test_no_option_is_offered_that_would_not_be_enough() -> None:
    machine, workload = lacking_memory()
    options = remedy(V32, machine, workload).options
    assert not any("context" in option or "sequence" in option for option in options)


def test_a_disk_that_is_too_small_is_asked_for_beside_everything_else() -> None:
    machine, workload = lacking_memory()
    mend = remedy(V32, replace(machine, disk_bytes=300 * GB), workload)
    assert amount(mend.required[0]) == pytest.approx(V32.nbytes - 300 * GB, abs=GB)
    assert mend.options


def test_where_only_the_disk_is_too_small_nothing_else_is_asked_for() -> None:
    mend = remedy(V41, replace(MACHINE, disk_bytes=300 * GB), Workload(8192, 1))
    assert mend.options == ()
    assert len(mend.required) == 1
