"""`loci bench plan`: a tiny model beside its plan; the rates of the machine are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench import plan_error
from engine.bench.plan_error import Rates, budgets
from engine.families.loader import open_checkpoint
from engine.families.shapes import loaded_shape_of
from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from memory.hardware.this_machine import Result
from memory.planner.serving import memory_bytes
from quant.errors import LociError
from tests.server.harness import invoke


@pytest.fixture
def model(tmp_path: Path) -> Path:
    out = tmp_path / "tiny"
    write_checkpoint(plan_slice("v41-tiny", 3, 2000), out, lambda done, total: None)
    return out


@pytest.fixture
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_error, "measure_dram", lambda n: [Result("dram_read", 20.0, "GB/s")])
    monkeypatch.setattr(plan_error, "measure_cpu", lambda n: [Result("cpu_matmul", 100.0, "GFLOP/s")])
    monkeypatch.setattr(plan_error, "read_rates", lambda file, seconds: [1e9, 2e9])


def test_budgets_hold_shares_of_the_experts_beside_all_else(model: Path) -> None:
    shape = loaded_shape_of(open_checkpoint(model))
    few, some, all_ = budgets(shape, 1 << 40)
    experts = sum(layer.experts for layer in shape.layers) * shape.slot_nbytes
    assert few < some < all_
    assert all_ >= memory_bytes(shape)
    assert some - few == pytest.approx(0.3 * 1.02 * experts, abs=2)
    assert budgets(shape, few) == [few], "there is no more memory"


@pytest.mark.usefixtures("_rates")
@pytest.mark.slow
def test_decoding_and_a_prompt_are_compared_within_each_budget(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = invoke("bench", "plan", model, "--tokens", "8", "--prompt", "64", "--json", file)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" decode ") == result.stdout.count(" prompt ") == 3
    results = {r["name"]: r for r in json.loads(file.read_text())["results"]}
    for what in ("decode", "prompt"):
        of_each = [r["value"] for name, r in results.items() if name.startswith(f"plan_error_{what}_")]
        worst = results[f"plan_error_{what}"]
        assert worst["value"] == max(of_each)
        assert worst["met"] == (worst["value"] <= 0.15)


def test_the_middle_of_what_was_seen_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = Rates(tmp_path)
    with pytest.raises(LociError, match="too busy"):
        _ = rates.measured
    monkeypatch.setattr(plan_error, "measure_cpu", lambda n: [])
    monkeypatch.setattr(plan_error, "read_rates", lambda file, seconds: [])
    for rate in (10.0, 30.0, 20.0):
        monkeypatch.setattr(
            plan_error, "measure_dram", lambda n, rate=rate: [Result("dram_read", rate, "GB/s")]
        )
        rates.look()
    assert rates.measured == {"dram_read": 20.0}
