"""`loci bench engram` compares the same steps without tables, with them in DRAM, and with them on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.synthetic import plan_slice
from memory.checkpoint.random_files import write_checkpoint
from tests.server.harness import GOLDEN, ROOT, complaint, invoke, run

DEMO = ROOT / "deploy" / "demo"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slice") / "tiny"
    write_checkpoint(plan_slice("v41-tiny", 3, 20_000), out, lambda done, total: None)
    return out


@pytest.mark.parametrize("devices", [(), ("--devices", "virtual:500kB")], ids=["no GPU", "a virtual GPU"])
def test_every_case_is_measured_and_judged(model: Path, tmp_path: Path, devices: tuple[str, ...]) -> None:
    file = tmp_path / "engram.json"

    result = invoke(
        "bench", "engram", model, "--rounds", "2", "--tokens", "3", "--prompt", "16", "--warm", "400",
        "--json", file, *devices,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    found = {r["name"]: r for r in json.loads(file.read_text())["results"]}
    assert found["engram_dram_penalty"]["target"] == 0.01
    assert found["engram_nvme_penalty"]["target"] == 0.03
    assert found["engram_dram_uniform_hits"]["value"] == 1.0
    assert 0 < found["engram_nvme_zipf_hits"]["value"] < 1
    assert found["engram_nvme_uniform_hits"]["value"] < found["engram_nvme_zipf_hits"]["value"]
    assert 0 < found["engram_dram_zipf_lookup_p50"]["value"] <= found["engram_dram_zipf_lookup_p99"]["value"]


@pytest.mark.slow
def test_rows_of_a_trace_are_looked_up_where_it_is_this_models(tmp_path: Path) -> None:
    file, trace = tmp_path / "engram.json", DEMO / "traces" / "engram.safetensors"
    small = ("--rounds", "2", "--tokens", "3", "--prompt", "16")

    result = invoke("bench", "engram", DEMO / "loci-demo", *small, "--trace", trace, "--json", file)
    another = invoke("bench", "engram", GOLDEN / "v41-a", *small, "--trace", trace)
    none = invoke("bench", "engram", GOLDEN / "v41-a", "--trace", DEMO / "traces" / "routing.safetensors")
    long = invoke("bench", "engram", DEMO / "loci-demo", "--rounds", "500", "--trace", trace)

    assert result.returncode == 0, result.stderr
    found = {r["name"]: r["value"] for r in json.loads(file.read_text())["results"]}
    assert 0 < found["engram_nvme_recorded_hits"] < found["engram_dram_recorded_hits"] == 1.0
    assert "engram_dram_zipf_hits" not in found
    assert "the trace was recorded with another model" in complaint(another.stderr)
    assert "not an Engram row trace" in complaint(none.stderr)
    assert "ask for fewer" in complaint(long.stderr)


@pytest.mark.slow
def test_a_model_without_tables_is_refused() -> None:
    tables_off = run("bench", "engram", GOLDEN / "nothing")
    assert tables_off.returncode == 1
    assert complaint(tables_off.stderr).count("\n") == 1
