"""Measurements come out plausible, clean up after themselves, and say when they cannot be made."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from memory.hardware import measure
from memory.hardware.measure import (
    measure_cpu,
    measure_disk,
    measure_dram,
    measure_gpus,
    read_rates,
    working_bytes,
)
from memory.hardware.this_machine import Result
from quant.errors import ConfigError, LociError
from quant.kernels.cpu import library

MB = 1 << 20


def values(results: list[Result]) -> dict[str, float]:
    return {result.name: result.value for result in results}


def test_reads_from_dram_and_rows_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DOUBT", 0)  # however busy this machine is now
    found = values(measure_dram(32 * MB))
    assert found.keys() == {"dram_read_1_thread", "dram_read", "dram_random_rows"}
    assert 0.1 < found["dram_read"] < 10_000
    assert found["dram_random_rows"] > 1000


def rates(*values: float) -> Callable[[], float]:
    return iter(values).__next__


def test_all_cores_that_seem_slower_than_one_are_measured_again() -> None:
    assert measure.rates_of_one_and_all(rates(10.0), rates(40.0)) == (10.0, 40.0)
    assert measure.rates_of_one_and_all(rates(10.0, 11.0), rates(4.0, 30.0)) == (11.0, 30.0)


def test_all_cores_are_as_fast_as_one_at_least() -> None:
    assert measure.rates_of_one_and_all(rates(*[10.0] * 4), rates(*[9.5] * 4)) == (10.0, 10.0)


def test_a_machine_too_busy_to_be_measured_is_refused() -> None:
    with pytest.raises(
        LociError, match=r"4 GB/s, but one core alone at 10 GB/s: .* measure again when it is idle"
    ):
        measure.rates_of_one_and_all(rates(*[10.0] * 4), rates(*[4.0] * 4))


def int_xor(words: np.ndarray) -> int:
    return int(np.bitwise_xor.reduce(words))


def test_without_compiled_kernels_the_reads_are_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise library.LibraryMissingError("not built")

    monkeypatch.setattr(library, "load", missing)
    data = torch.randint(0, 256, (MB,), dtype=torch.uint8)
    parts = measure._reader(data, 2)()
    words = data.numpy().view("int64")
    assert parts == [int_xor(words[: len(words) // 2]), int_xor(words[len(words) // 2 :])]


def test_the_kernels_are_measured_on_experts_and_on_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EXPERT_HIDDEN", 256)
    monkeypatch.setattr(measure, "EXPERT_WIDTH", 128)
    found = values(measure_cpu(2 * MB))
    assert found.keys() == {"cpu_experts", "cpu_matmul", "cpu_matmul_fp8", "expert_rearranged_1_thread"}
    assert min(found.values()) > 0


def test_the_disk_is_measured_at_several_depths_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "RANDOM_SECONDS", 0.02)
    found = values(measure_disk(tmp_path, 16 * MB))
    assert list(tmp_path.iterdir()) == []
    if not found:
        pytest.skip("the temporary directory refuses direct reads")
    depths = {f"disk_read_depth_{n}" for n in (1, 4, 16)} | {
        f"disk_random_reads_depth_{n}" for n in (1, 8, 32)
    }
    assert found.keys() == depths | {"disk_read", "disk_random_reads"}
    assert found["disk_read"] == max(value for name, value in found.items() if name.startswith("disk_read_"))


def test_a_file_system_without_direct_reads_gives_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(path: str | Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert measure_disk(tmp_path, 8 * MB) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "shard"
    file.write_bytes(bytes(measure.READ_BYTES + 5))
    found = read_rates(file, 0.02)
    if not found:
        pytest.skip("the temporary directory refuses direct reads")
    assert len(found) == len(measure.READ_DEPTHS)
    assert min(found) > 0
    file.write_bytes(bytes(measure.READ_BYTES - 1))
    assert read_rates(file, 0.02) == []

    def gone(*_: object) -> int:
        raise OSError(5, "Input/output error")

    file.write_bytes(bytes(measure.READ_BYTES))
    monkeypatch.setattr(os, "preadv", gone)
    with pytest.raises(ConfigError, match="shard: cannot be read"):
        read_rates(file, 0.02)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write a test file"):
        measure_disk(tmp_path / "missing", 8 * MB)


def test_measuring_takes_little_of_the_memory_that_is_free() -> None:
    assert 0 < working_bytes() <= 1 << 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_gpus_nothing_is_measured_of_them() -> None:
    assert measure_gpus() == []


def test_what_measuring_took_of_a_gpu_is_free_again_also_where_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive_when_emptied: list[int] = []
    locked: list[int] = []

    def lock(host: torch.Tensor) -> str:
        locked.append(host.data_ptr())
        return ""

    def fails(hosts: list[torch.Tensor]) -> list[Result]:
        assert [host.data_ptr() for host in hosts] == locked
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("a small card")

    def emptied() -> None:
        alive_when_emptied.append(sum(each() is not None for each in held))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(measure, "lock_pages", lock)
    monkeypatch.setattr(measure, "unlock_pages", lambda host: locked.remove(host.data_ptr()))
    monkeypatch.setattr(measure, "_gpu_results", lambda hosts: [])
    assert measure_gpus() == []
    monkeypatch.setattr(measure, "_gpu_results", fails)
    with pytest.raises(torch.OutOfMemoryError):
        measure_gpus()
    assert alive_when_emptied == [0, 0]
    assert locked == []
    monkeypatch.setattr(measure, "lock_pages", lambda host: "out of memory")
    with pytest.raises(RuntimeError, match=r"256 MiB of host memory cannot be page-locked \(out of memory\)"):
        measure_gpus()
