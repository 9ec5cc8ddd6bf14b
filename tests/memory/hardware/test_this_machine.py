"""This machine's profile: measurements where there are any, and plain words where there are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memory.hardware.detect import Gpu, Machine, PcieLink, detect
from memory.hardware.this_machine import Result, cache_path, read_measured, this_machine, write_results
from quant.errors import ConfigError

MACHINE = Machine(
    system="Linux", cpu="A Processor", cores=8, cpu_flags=("avx2", "fma"), memory_bytes=64 << 30,
    memory_limit_bytes=None, available_bytes=60 << 30, disk_free_bytes=10**12,
    gpus=(Gpu(0, "A GPU", 24 << 30, (8, 9), free_bytes=23 << 30),),
)  # fmt: skip
RESULTS = (
    Result("dram_read", 41.5, "GB/s"), Result("cpu_experts", 33.0, "GB/s"),
    Result("cpu_matmul", 310.0, "GFLOP/s"), Result("disk_read", 6.1, "GB/s"),
    Result("disk_random_reads", 412_000.0, "reads/s"), Result("dram_random_rows", 2e6, "rows/s"),
    Result("link_0", 24.0, "GB/s"), Result("link_0_together", 13.0, "GB/s"), Result("vram_0", 900.0, "GB/s"),
    Result("gpu_matmul_0", 140.0, "TFLOP/s"),
)  # fmt: skip


def test_measurements_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "hardware.json"
    write_results(path, MACHINE, RESULTS)
    assert read_measured(MACHINE, path) == {result.name: result.value for result in RESULTS}
    assert [entry.name for entry in path.parent.iterdir()] == ["hardware.json"]


def test_results_have_the_form_of_every_benchmark(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", MACHINE, RESULTS)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report.keys() == {"machine", "results"}
    assert report["results"][0].keys() == {"name", "value", "unit", "target", "met"}


@pytest.mark.parametrize(
    "other", [replace(MACHINE, cpu="Another"), replace(MACHINE, cores=4), replace(MACHINE, gpus=())]
)
def test_measurements_of_another_machine_are_not_used(tmp_path: Path, other: Machine) -> None:
    write_results(tmp_path / "r.json", MACHINE, RESULTS)
    assert read_measured(other, tmp_path / "r.json") == {}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"machine": {}}', '{"machine": 3, "results": []}', "[" * 100_000]
)
def test_a_damaged_cache_counts_as_not_measured(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    assert read_measured(MACHINE, tmp_path / "r.json") == {}


def test_values_that_cannot_be_are_ignored(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", MACHINE, [Result("dram_read", 0.0, "GB/s"), Result("x", 1e999, "")])
    assert read_measured(MACHINE, tmp_path / "r.json") == {}


def test_a_measured_machine_assumes_nothing() -> None:
    profile = this_machine(MACHINE, {result.name: result.value for result in RESULTS})
    assert profile.assumed == ()
    assert profile.dram_bytes_per_s == 41.5e9
    assert profile.expert_bytes_per_s == 33e9
    assert profile.disk_reads_per_s == 412_000
    assert profile.gpus[0].memory_bytes == 23 << 30
    assert profile.gpus[0].link_bytes_per_s == 24e9
    assert profile.gpus[0].link_together_bytes_per_s == 13e9
    assert profile.gpus[0].matmul_flops == 140e12


def test_what_was_not_measured_is_said_with_the_value_taken() -> None:
    profile = this_machine(MACHINE, {})
    for topic in ("DRAM read bandwidth: 30 GB/s", "CPU arithmetic", "disk reads", "link of GPU 0", "VRAM"):
        assert any(topic in line for line in profile.assumed), topic


def test_an_unmeasured_link_is_taken_to_be_as_fast_as_its_lanes() -> None:
    gpu = replace(MACHINE.gpus[0], pcie=PcieLink(5, 8))
    profile = this_machine(replace(MACHINE, gpus=(gpu,)), {})
    assert profile.gpus[0].link_bytes_per_s == PcieLink(5, 8).usable_bytes_per_s
    assert any("link of GPU 0: 25.2 GB/s" in line for line in profile.assumed)


def test_a_gpus_bandwidth_by_the_data_sheet_needs_no_measuring() -> None:
    gpu = replace(MACHINE.gpus[0], memory_bytes_per_s=1008e9)
    assert this_machine(replace(MACHINE, gpus=(gpu,)), {}).gpus[0].memory_bytes_per_s == 1008e9


@pytest.mark.parametrize(
    ("flags", "level"), [((), "portable"), (("avx2",), "avx2"), (("avx2", "avx512_vnni"), "avx512")]
)
def test_the_level_of_the_kernels_follows_the_processor(flags: tuple[str, ...], level: str) -> None:
    assert this_machine(replace(MACHINE, cpu_flags=flags), {}).cpu_level == level


def test_memory_is_what_is_free_now() -> None:
    profile = this_machine(detect(), {})
    assert 0 < profile.dram_bytes < detect().memory_bytes


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "loci" / "hardware.json"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_results(tmp_path / "file" / "r.json", MACHINE, RESULTS)


def test_a_rate_of_all_cores_below_that_of_one_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "hardware.json"
    write_results(
        file, MACHINE, [Result("dram_read_1_thread", 12.0, "GB/s"), Result("dram_read", 5.0, "GB/s")]
    )

    assert read_measured(MACHINE, file) == {"dram_read_1_thread": 12.0}
