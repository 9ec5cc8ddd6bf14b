"""What a server sees of a machine in a moment, and how long that is believed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory.hardware import quick
from memory.hardware.detect import Machine, detect
from memory.hardware.quick import known_rates
from memory.hardware.this_machine import Result, cache_path, write_results

Stage = tuple[tuple[str, ...], Callable[[], list[Result]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that were measured, of which `a/...` and `b/...` are on disks of 2 and 5 GB/s."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(quick, "disk_of", lambda file: {"a": 1, "b": 2}[file.parts[0]])
    seen: list[str] = []

    def stages(machine: Machine, file: Path | None) -> Iterator[Stage]:
        def disk() -> list[Result]:
            seen.append(str(file))
            assert file is not None
            return [Result("disk_read", {"a": 2.0, "b": 5.0}[file.parts[0]], "GB/s")]

        yield ("dram_read",), lambda: [Result("dram_read", 40.0, "GB/s")]
        if file is not None:
            yield ("disk_read",), disk

    monkeypatch.setattr(quick, "_stages", stages)
    return seen


def test_a_disks_rate_is_kept_for_its_own_files_only(measured: list[str]) -> None:
    machine = detect()
    rates = [known_rates(machine, Path(file))["disk_read"] for file in ("a/1", "a/2", "b/1", "b/2", "a/1")]
    assert rates == [2.0, 2.0, 5.0, 5.0, 2.0]
    assert measured == ["a/1", "b/1", "a/1"]


def test_a_benchmark_of_another_disk_says_nothing_of_this_one(measured: list[str]) -> None:
    machine = detect()
    results = [Result("disk_read", 2.5, "GB/s"), Result("dram_read", 41.0, "GB/s")]
    write_results(cache_path(), machine, results, 1)
    assert known_rates(machine, Path("a/1")) == {"disk_read": 2.5, "dram_read": 41.0}
    assert known_rates(machine, Path("b/1")) == {"disk_read": 5.0, "dram_read": 41.0}
    assert known_rates(machine) == {"disk_read": 2.5, "dram_read": 41.0}
    assert measured == ["b/1"]
