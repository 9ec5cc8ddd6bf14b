"""`loci bench slice`, on a virtual GPU and on one in name only; the rates of the machine are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.bench import slice as bench_slice
from engine.families.registry import family_of
from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from memory.checkpoint.safetensors_files import open_safetensors
from memory.hardware.detect import Gpu, detect
from memory.hardware.this_machine import Result
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.placing import GPU_BASE_BYTES
from memory.tiers import Tier
from quant.errors import LociError
from quant.kernels.choice import choose
from quant.kernels.devices import DeviceKernels
from tests.engine.families.test_virtual_gpus import OneGpu
from tests.pretend_gpus import pretend_gpus
from tests.server.harness import invoke

GPU_BYTES = GPU_BASE_BYTES + 2_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slice") / "tiny"
    write_checkpoint(plan_slice("v41-tiny", 3, 2000), out, lambda done, total: None)
    return out


@pytest.fixture(autouse=True)
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*results: tuple[str, float, str]) -> list[Result]:
        return [Result(*result) for result in results]

    monkeypatch.setattr(
        "memory.hardware.measure.measure_dram", lambda n: measured(("dram_read", 20.0, "GB/s"))
    )
    monkeypatch.setattr(
        "memory.hardware.measure.measure_cpu", lambda n: measured(("cpu_matmul", 100.0, "GFLOP/s"))
    )
    monkeypatch.setattr(
        "memory.hardware.measure.measure_disk", lambda directory, n: measured(("disk_read", 1.0, "GB/s"))
    )
    monkeypatch.setattr("memory.hardware.measure.read_rates", lambda file, seconds: [1e9])
    monkeypatch.setattr(
        "memory.hardware.measure.measure_gpus",
        lambda: measured(
            ("link_0", 50.0, "GB/s"),
            ("link_0_together", 50.0, "GB/s"),
            ("vram_0", 4000.0, "GB/s"),
            ("gpu_matmul_0", 600.0, "TFLOP/s"),
        ),
    )


@pytest.fixture
def _one_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--devices cuda:...` would find on a machine with a GPU."""
    machine = replace(detect(), gpus=(Gpu(0, "A GPU", 24 << 30, (9, 0), free_bytes=23 << 30),))
    monkeypatch.setattr("memory.hardware.detect.detect", lambda directory=None: machine)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def budget(dram: str | None, devices: str | None, workload: Workload) -> MemoryBudget:
        return MemoryBudget(30_000_000, (Tier("vram:0", GPU_BYTES, torch.device("gpu", 0), 12e9),), workload)

    def load(path: Path, budget: MemoryBudget) -> SimpleNamespace:
        checkpoint = open_safetensors(path)
        family = family_of(checkpoint)
        kernels = DeviceKernels(choose(), {gpu.device: OneGpu(gpu.device) for gpu in budget.gpus})
        return SimpleNamespace(
            model=family.load(checkpoint, kernels, budget), components=family.describe(checkpoint)[1]
        )

    monkeypatch.setattr(MemoryBudget, "of_this_machine", budget)
    monkeypatch.setattr(bench_slice, "load", load)


def measured(model: Path, file: Path, devices: str) -> tuple[str, dict[str, float]]:
    """What is printed, and the results by name."""
    result = invoke(
        "bench", "slice", model, "--dram-budget", "1900kB", "--devices", devices, "--tokens", "3",
        "--json", file,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, {r["name"]: r["value"] for r in json.loads(file.read_text())["results"]}


def test_a_virtual_gpus_link_is_as_fast_as_it_is_told(model: Path, tmp_path: Path) -> None:
    text, found = measured(model, tmp_path / "r.json", "virtual:300kB@50MB/s")
    assert found["slice_decode"] > 0
    assert found["plan_error_slice"] >= 0
    assert "vram:0 memory" not in text
    assert "from extra tokens, computed operation by operation; such a token took" in text
    assert "link_0" not in found


def test_what_was_decoded_is_kept_where_the_machine_is_too_busy_to_be_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(nbytes: int) -> list[Result]:
        raise LociError("something else keeps this machine busy")

    monkeypatch.setattr("memory.hardware.measure.measure_dram", refused)
    file = tmp_path / "r.json"

    result = invoke("bench", "slice", model, "--dram-budget", "1900kB", "--tokens", "3", "--json", file)

    assert result.returncode == 1
    assert "keeps this machine busy" in result.stderr
    assert "tokens/s decoded" in result.stdout
    found = {r["name"]: r["value"] for r in json.loads(file.read_text())["results"]}
    assert found["slice_decode"] > 0
    assert "slice_decode_bound_ratio" not in found


@pytest.mark.slow
@pytest.mark.usefixtures("_one_gpu")
def test_a_real_gpu_is_measured_and_planned_with(model: Path, tmp_path: Path) -> None:
    with pretend_gpus():
        text, found = measured(model, tmp_path / "r.json", f"cuda:{GPU_BYTES}")
    assert "\nvram:0 memory " in text
    assert "from extra tokens, computed operation by operation, with a GPU synchronisation" in text
    assert found["link_0"] == 50.0
    assert found["slice_hits_vram:0"] > 0
    assert 0 < found["slice_decode_bound_ratio"] <= found["slice_decode_ordered_ratio"]
    assert found["plan_error_slice"] > 0  # the plan knows a GPU that is not there
