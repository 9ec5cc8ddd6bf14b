"""Budgets as people write them."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch

from memory.hardware.profiles import DeviceSpec, load_profile, parse_devices
from memory.planner.budget import MemoryBudget, gpus_advice, unused_gpus_notice
from quant.errors import BudgetError, ConfigError


@pytest.fixture(autouse=True)
def _ten_gigabytes_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory.planner.budget.available_memory_bytes", lambda: 10 * 10**9)


def test_without_a_word_weights_get_a_share_of_what_is_free() -> None:
    assert MemoryBudget.of_this_machine() == MemoryBudget(7_500_000_000)


def test_virtual_gpus_take_their_memory_from_the_host() -> None:
    budget = MemoryBudget.of_this_machine(devices="virtual:1GB@12.5GB/s,virtual:2GB")
    assert budget.dram_bytes == 4_500_000_000
    assert [(t.name, t.budget_bytes, t.link_bytes_per_s) for t in budget.gpus] == [
        ("vram:0", 10**9, 12.5e9),
        ("vram:1", 2 * 10**9, None),
    ]
    assert all(gpu.is_virtual for gpu in budget.gpus)


def test_a_dram_budget_is_taken_as_given() -> None:
    assert MemoryBudget.of_this_machine(dram="1GiB").dram_bytes == 1 << 30


@pytest.mark.parametrize(("dram", "devices"), [("11GB", None), ("9GB", "virtual:2GB"), (None, "virtual:8GB")])
def test_more_than_there_is_is_refused(dram: str | None, devices: str | None) -> None:
    with pytest.raises(BudgetError, match=r"only 10\.0 GB of memory is free; lower them"):
        MemoryBudget.of_this_machine(dram, devices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU 0: the installed PyTorch is built for the CPU"):
        MemoryBudget.of_this_machine(devices="cuda:20GiB")


@pytest.mark.parametrize("text", ["many", "12 parsecs", "-1GB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a( plausible)? size"):
        MemoryBudget.of_this_machine(dram=text)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two real GPUs, each with 20 GB free and, measured, 11 GB/s beside the other."""
    machine = load_profile("2x4090-256g")
    gpus = tuple(replace(gpu, link_together_bytes_per_s=11e9) for gpu in machine.gpus)
    machine = replace(machine, gpus=gpus, expert_bytes_per_s=77e9)
    monkeypatch.setattr("memory.planner.budget.this_machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (20 * 10**9, 24 * 10**9))


@pytest.mark.usefixtures("two_gpus")
def test_a_real_gpu_takes_nothing_of_the_host_and_is_as_fast_as_measured() -> None:
    budget = MemoryBudget.of_this_machine(devices="cuda:16GiB")
    assert budget.dram_bytes == 7_500_000_000
    (gpu,) = budget.gpus
    assert (gpu.device, gpu.budget_bytes) == (torch.device("cuda", 0), 16 << 30)
    assert not gpu.is_virtual
    assert gpu.link_bytes_per_s == 11e9
    assert budget.cpu_bytes_per_s == 77e9


@pytest.mark.usefixtures("two_gpus")
def test_a_card_that_is_not_the_first_keeps_its_number() -> None:
    (gpu,) = MemoryBudget.of_this_machine(devices=(DeviceSpec("cuda", 1, 16 << 30, None),)).gpus
    assert (gpu.name, gpu.device) == ("vram:0", torch.device("cuda", 1))


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("devices", "warnings"), [("cuda:1GB,virtual:1GB", 0), ("cuda:1GB,cuda:1GB", 1)])
def test_only_several_real_gpus_are_said_to_be_unproven(
    devices: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "loci.memory"):
        MemoryBudget.of_this_machine(devices=devices)
    assert len(caplog.messages) == warnings
    assert all("two real GPUs together is untested" in message for message in caplog.messages)


@pytest.mark.usefixtures("two_gpus")
def test_more_than_is_free_on_a_gpu_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"GPU 0 has 20\.0 GB free, but 23\.6 GB was requested"):
        MemoryBudget.of_this_machine(devices="cuda:22GiB")
    with pytest.raises(ConfigError, match="no CUDA GPU 2; this machine has 2"):
        MemoryBudget.of_this_machine(devices="cuda:1GB,cuda:1GB,cuda:1GB")


def test_who_has_gpus_and_uses_none_is_told_what_to_pass() -> None:
    (one, nbytes) = gpu = ("NVIDIA GeForce RTX 4090", 25_757_220_864)

    assert gpus_advice([gpu]) == (
        f"this machine has a GPU ({one}), but Loci does not use it: to use it, pass --devices cuda:22GiB or "
        "set LOCI_DEVICES=cuda:22GiB"
    )
    two = gpus_advice([gpu, ("Another", nbytes // 3)])
    assert "2 GPUs (NVIDIA GeForce RTX 4090, Another), but Loci does not use them" in two
    (devices,) = re.findall(r"--devices (\S+)", two)
    assert [device.budget_bytes >> 30 for device in parse_devices(devices)] == [22, 7]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_without_gpus_there_is_nothing_to_tell() -> None:
    assert unused_gpus_notice(None) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_real_gpus_are_told_of_unless_devices_were_asked_for() -> None:
    notice = unused_gpus_notice(None)
    assert notice is not None
    assert torch.cuda.get_device_name(0) in notice
    assert unused_gpus_notice("virtual:1GB") is None
