"""`loci bench prefill` on a tiny slice; the rates of the machine are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from memory.hardware.this_machine import Result
from server.cli.bench import prefill
from tests.server.harness import invoke


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, result in {
        "measure_dram": Result("dram_read", 20.0, "GB/s"),
        "measure_cpu": Result("cpu_matmul", 100.0, "GFLOP/s"),
        "measure_disk": Result("disk_read", 1.0, "GB/s"),
    }.items():
        monkeypatch.setattr(f"memory.hardware.measure.{name}", lambda *_, made=result: [made])
    monkeypatch.setattr("memory.hardware.measure.read_rates", lambda file, seconds: [1e9])
    monkeypatch.setattr(prefill, "TAIL_LAYERS", 24)
    monkeypatch.setattr(prefill, "TAIL_TOKENS", 600)
    monkeypatch.setattr(prefill, "RESTORED_MODEL", Path("demo"))
    monkeypatch.setattr(prefill, "RESTORED_TOKENS", 600)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_a_prompt_within_budgets_is_set_against_its_bound_and_its_plan(tmp_path: Path) -> None:
    out, report = tmp_path / "tiny", tmp_path / "prefill.json"
    write_checkpoint(plan_slice("v41-tiny", 4, 2000), out, lambda done, total: None)
    said = invoke(
        "bench", "prefill", str(out), "--dram-budget", "1900kB", "--devices", "virtual:60kB@50MB/s",
        "--tokens", "300", "--chunk", "100", "--rounds", "1", "--json", str(report),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "300 tokens in chunks of 100" in said.stdout
    found = {result["name"]: result for result in json.loads(report.read_text())["results"]}
    assert 0 < found["slice_prefill_bound_ratio"]["value"] <= 1
    assert found["slice_prefill_chunk"]["value"] == 100
    assert found["exact_tail_gain"]["value"] > 0.5
    assert 1 < found["exact_tail_bound"]["value"] < 2
    assert 1 < found["exact_tail_flops_bound"]["value"] < 3
    assert found["released_tail_flops_bound"]["value"] == pytest.approx(1.92, abs=0.01)
    assert 0 < found["restored_s"]["value"] < found["computed_s"]["value"]
    assert found["prefill_plan_error"]["met"] in (True, False)
