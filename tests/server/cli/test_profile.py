"""`loci profile` and `loci bench experts`: from a text to hot experts placed first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.embedded import model_path
from engine.families.loader import load
from memory.experts.traces import FILE_NAME, RoutingTrace
from memory.planner.budget import MemoryBudget
from tests.server.harness import GOLDEN, TINY, complaint, invoke, run


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


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """A model without index, in one file that is called as its maker liked; a text of 200 words beside it."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    tensors = {name: t for shard in model.glob("model-*.safetensors") for name, t in load_file(shard).items()}
    for file in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, model / "weights.safetensors")
    (tmp_path / "text.txt").write_text("word " * 200)
    return model


def test_a_model_without_index_answers_as_before_once_it_has_a_record(one_file: Path) -> None:
    ask = ("run", one_file, "Hello", "--max-tokens", "4", "--temperature", "0")
    before = invoke(*ask)

    assert invoke("profile", one_file, one_file.parent / "text.txt").returncode == 0

    assert (one_file / FILE_NAME).is_file()
    after = invoke(*ask)
    assert (after.returncode, after.stdout) == (0, before.stdout)


def test_records_beside_a_model_may_have_any_name(one_file: Path) -> None:
    ask = ("run", one_file, "Hello", "--max-tokens", "4", "--temperature", "0")
    before = invoke(*ask)
    text, ids = one_file.parent / "text.txt", one_file.parent / "ids.json"
    ids.write_text("[1, 2, 3]")

    for write in (
        ("profile", one_file, text, "--out", one_file / "mine.safetensors"),
        ("logits", one_file, "--ids-file", ids, "--out", one_file / "logits.safetensors", "--greedy", "2"),
    ):
        assert invoke(*write).returncode == 0

    after = invoke(*ask)
    assert (after.returncode, after.stdout) == (0, before.stdout)


def test_a_record_of_more_tokens_is_kept(one_file: Path) -> None:
    record = one_file / FILE_NAME
    profile = ("profile", one_file, one_file.parent / "text.txt", "--tokens")
    RoutingTrace(torch.zeros(40, 5, 2)).save(record)

    refused = invoke(*profile, "39")

    assert refused.returncode == 1
    assert (
        "routing.safetensors: already holds a trace of 40 "
        "tokens, longer than this one of 39" in refused.stderr
    )
    assert RoutingTrace.load(record).tokens == 40
    assert "in place of one of 40" in invoke(*profile, "41").stdout
    assert RoutingTrace.load(record).tokens == 41


def test_a_file_that_is_no_record_is_not_overwritten(one_file: Path) -> None:
    weights = one_file / "weights.safetensors"
    content = weights.read_bytes()

    refused = invoke("profile", one_file, one_file.parent / "text.txt", "--out", weights)

    assert refused.returncode == 1
    assert "not a routing trace" in refused.stderr
    assert weights.read_bytes() == content


def test_a_place_that_cannot_be_written_to_is_named_before_the_model_is_loaded(one_file: Path) -> None:
    (one_file / "weights.safetensors").unlink()

    for out, said in (("/proc/1/record", "/proc/1/record: cannot be written"), (one_file, "a directory")):
        refused = invoke("profile", one_file, one_file.parent / "text.txt", "--out", out)
        assert refused.returncode == 1
        assert said in refused.stderr


def test_models_that_come_with_loci_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 200)

    refused = invoke("profile", "demo", tmp_path / "text.txt")

    assert refused.returncode == 1
    assert "comes with Loci and is not modified; name a file to write with --out" in refused.stderr
    assert not (model_path(Path("demo")) / FILE_NAME).exists()


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
