"""`loci bench step` prints where a step's time goes, and judges what was promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from quant.kernels import choice
from quant.kernels.cpu import library
from quant.kernels.reference import ReferenceKernels
from tests.server.harness import TINY, invoke

needs_kernels = pytest.mark.skipif(
    library.library_path() is None, reason="the compiled kernels were not built"
)
LITTLE = 8 << 20
FEW = ("--rounds", "1", "--tokens", "3")


@pytest.fixture(autouse=True)
def _little_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory.hardware.measure.working_bytes", lambda: LITTLE)


def measured(file: Path, *arguments: str | Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """What is printed, and the results by name."""
    result = invoke("bench", "step", *arguments, *FEW, "--json", file)
    assert result.returncode == 0, result.stderr
    return result.stdout, {r["name"]: r for r in json.loads(file.read_text())["results"]}


@needs_kernels
def test_a_step_is_listed_part_by_part(tmp_path: Path) -> None:
    text, found = measured(tmp_path / "step.json", TINY)

    assert "part of a step" in text
    assert "sampling" in text
    assert "step_kernel_share" in text
    assert found["step_kernel_share"]["value"] > 0
    assert found["step_kernel_share"]["target"] is None
    assert found["step_sampling_us"]["unit"] == "us"
    assert found["step_kernel_calls"]["value"] >= 1
    assert found["resident_step_read_ratio"]["value"] > 0
    # A token reads less than caches hold, which says nothing about memory.
    assert found["resident_step_read_ratio"]["target"] is None


@needs_kernels
@pytest.mark.slow
def test_the_demonstration_models_share_is_judged(tmp_path: Path) -> None:
    text, found = measured(tmp_path / "step.json", "demo", "--temperature", "0.2", "--top-p", "0.9")

    assert found["step_kernel_share"]["target"] == 0.8
    assert found["step_kernel_share"]["met"] == (found["step_kernel_share"]["value"] >= 0.8)
    assert "target  met" in text


@needs_kernels
def test_reads_are_compared_only_where_everything_is_in_memory(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    write_checkpoint(plan_slice("v41-tiny", 3, 2000), model, lambda done, total: None)

    text, found = measured(tmp_path / "step.json", model, "--dram-budget", "1500kB")

    assert "step_kernel_share" in found
    assert "resident_step_read_ratio" not in found
    assert "plain_read" not in text


def test_without_compiled_kernels_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", ReferenceKernels)

    result = invoke("bench", "step", TINY)

    assert result.returncode == 1
    assert "loci: nothing to measure: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model: no such file or directory"),
        ([TINY, "--tokens", "100000"], "max_model_len is 100034, but v41-c supports at most"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(arguments: list[str | Path], message: str) -> None:
    result = invoke("bench", "step", *arguments)

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
