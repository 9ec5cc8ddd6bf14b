"""On a machine with GPUs that a command does not use, it says so when it starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.server.harness import TINY, invoke

NOTICE = "this machine has a GPU (A GPU), but Loci does not use it: to use it, pass --devices cuda:22GiB or"

FREE_BYTES = 100 << 20  # too few for CUDA itself


@pytest.fixture(autouse=True)
def _a_gpu_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test machine need have one; only what torch tells of it is played."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(name="A GPU", total_memory=24 << 30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (FREE_BYTES, 24 << 30))


def test_a_model_that_is_faster_without_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert invoke("run", TINY, "Hello", "--max-tokens", "1").returncode == 0

    assert "no GPU of this machine is used: by plan" in caplog.text


def test_who_wants_none_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    assert invoke("run", TINY, "Hello", "--max-tokens", "1", "--devices", "none").returncode == 0

    assert "no GPU" not in caplog.text


def test_who_asked_for_devices_knows(caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--devices", "virtual:64KB@100MB/s", "--dram-budget", "1.34MB")
    result = invoke("run", TINY, "Hello", "--max-tokens", "1", *flags)

    assert result.returncode == 0, result.stderr
    assert "no GPU of this machine is used" not in caplog.text + result.stderr


def test_benchmarks_that_take_devices_say_it_too() -> None:
    result = invoke("bench", "slice", Path("/no/such/model"))

    assert NOTICE in result.stderr
