"""`loci profile` and `loci bench experts`: from a text to hot experts placed first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.families.loader import load
from memory.experts.traces import FILE_NAME, RoutingTrace
from memory.planner.budget import MemoryBudget
from tests.server.harness import GOLDEN, TINY, complaint, run


@pytest.mark.slow
def test_a_profile_beside_the_model_brings_its_hot_experts_in_first(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    result = run("profile", model, text)
    assert result.returncode == 0, result.stderr
    assert f"{model / FILE_NAME}: routing of" in result.stdout

    trace = RoutingTrace.load(model / FILE_NAME)
    shares = trace.shares(8)
    loaded = load(model, MemoryBudget(1_600_000)).model
    store = loaded.weights.experts  # type: ignore[attr-defined]
    held = store.residency()["dram"] // 5
    tiers = store.expert_locations()
    assert 1 <= held < 8
    for layer in range(5):
        hottest = shares[layer].topk(held).indices.tolist()
        kept = [expert for expert in range(8) if tiers[layer][expert] == "dram"]
        assert shares[layer][kept].sum() >= shares[layer][hottest].sum() - 1e-9
    loaded.close()


@pytest.mark.slow
def test_policies_are_printed_beside_belady(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    file, report = tmp_path / "trace.safetensors", tmp_path / "report.json"
    RoutingTrace(torch.randint(0, 16, (50, 3, 2), generator=generator)).save(file)
    result = run("bench", "experts", "--trace", file, "--experts", "16", "--json", report)
    assert result.returncode == 0, result.stderr
    assert "predictive" in result.stdout
    names = {entry["name"] for entry in json.loads(report.read_text())["results"]}
    assert "expert_hits_of_belady_lru_0.5" in names


@pytest.mark.slow
def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    result = run("bench", "experts", "--trace", GOLDEN / "v41-a" / "config.json", "--experts", "16")
    assert result.returncode == 1
    assert "not a routing trace" in complaint(result.stderr)


@pytest.mark.slow
def test_a_text_that_is_none_is_named(tmp_path: Path) -> None:
    result = run("profile", TINY, tmp_path / "missing.txt", "--out", tmp_path / "o")
    assert result.returncode == 1
    assert "missing.txt: cannot be read as text" in complaint(result.stderr)
