"""A server plans for itself, holds what it planned, and says how the plan fares."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from engine.drafts.mtp import Mtp
from engine.embedded import model_path
from engine.families.loader import open_model
from memory.hardware.profiles import DeviceSpec, HardwareProfile, load_profile
from memory.hardware.this_machine import this_machine
from memory.planner.budget import MemoryBudget
from memory.planner.published import built_in
from memory.planner.serving import Asked
from memory.tiers import Tier
from quant.errors import BudgetError, ConfigError
from server.serving import planned as planned_module
from server.serving.planned import own_drafts_room, planned
from server.settings import resolve_settings
from tests.conftest import golden_path
from tests.engine.families.golden_families import family_path
from tests.server.conftest import StartServer
from tests.server.harness import DEADLINE_S, TINY, LociServer, complaint, invoke

TIERED = ("--dram-budget", "1.34MB", "--devices", "virtual:64KB@100MB/s,virtual:64KB@100MB/s")


def bytes_by_place(server: LociServer, name: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    places = {(s.labels["tier"], s.labels["part"]): s.value for s in samples}
    return {place: nbytes for place, nbytes in places.items() if nbytes}


@pytest.mark.slow
def test_a_server_holds_what_it_planned_and_measures_itself(
    start_server: StartServer, tmp_path: Path
) -> None:
    file = tmp_path / "learned.json"
    server = start_server(TINY, *TIERED, "--explain", "--measured-file", file).await_ready()
    said = server.out.read_text() + server.err.read_text()
    assert "The plan: " in said
    assert "--max-num-seqs " in said
    held = bytes_by_place(server, "loci_plan_allocated_bytes")
    planned_bytes = bytes_by_place(server, "loci_plan_bytes")
    in_memory = {place: nbytes for place, nbytes in planned_bytes.items() if place[0] != "nvme"}
    assert held == in_memory

    before = invoke("info", "--running", "--url", server.url, TINY)
    assert before.returncode == 0, before.stderr
    assert "bytes planned" in before.stdout
    assert "told after 100 steps" in before.stdout
    body = {"model": TINY.name, "prompt": "A test", "max_tokens": 160, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    after = invoke("info", "--running", "--url", server.url, TINY)
    assert "told after 100 steps" not in after.stdout
    assert server.metric("loci_plan_ratio") > 0

    server.signal(signal.SIGTERM)
    assert server.exit_code() == 0
    assert json.loads(file.read_text())
    plan = invoke("plan", TINY, "--measured", file)
    assert plan.returncode == 0, plan.stderr
    assert "times what was expected then" in plan.stdout


def test_what_was_measured_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "learned.json"
    file.write_text("{}")
    result = invoke("plan", TINY, "--measured", file)
    assert result.returncode == 1
    assert str(file) in complaint(result.stderr)


def test_a_model_that_does_not_fit_is_refused_with_the_smallest_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tiny_machine(*arguments: object) -> HardwareProfile:
        return replace(this_machine(), dram_bytes=0, disk_bytes=0)

    monkeypatch.setattr(planned_module, "this_machine", tiny_machine)
    monkeypatch.setattr(planned_module, "resident_bytes", lambda: 0)
    settings = resolve_settings({"model": TINY, "devices": "none"})
    with pytest.raises(BudgetError, match=r"does not fit on this machine.*the smallest change: .*DRAM"):
        planned(settings, open_model(TINY, None, None))


def test_a_card_is_used_by_its_own_number_where_the_first_has_no_room() -> None:
    machine = load_profile("2x4090-256g")
    small, large = (replace(machine.gpus[0], memory_bytes=nbytes) for nbytes in (400 << 20, 23 << 30))
    shape, asked = built_in("deepseek-v4.1-flash"), Asked(context=8192)
    devices, choice = planned_module._devices(None, shape, replace(machine, gpus=(small, large)), asked)
    assert devices == (DeviceSpec("cuda", 1, int(0.93 * (23 << 30)), None),)
    assert choice.why.endswith("set CUDA_VISIBLE_DEVICES=1 too")


def test_the_plan_counts_weights_that_guess_ahead_as_loading_does() -> None:
    demo = model_path("demo")
    opened = open_model(demo, None, None)
    found = {
        choice: planned(resolve_settings({"model": demo, "devices": "none", "drafts": choice}), opened)
        for choice in ("auto", "mtp", "lookup", "off")
    }
    bytes_of = {choice: plan.workload.draft_bytes for choice, plan in found.items()}
    assert bytes_of["auto"] == bytes_of["mtp"] > 0 == bytes_of["lookup"] == bytes_of["off"]
    assert found["auto"].plan.placement.allocated()["dram"]["drafts"] == bytes_of["auto"]

    loaded = opened.load(found["auto"].budget, drafts="auto")
    try:
        assert loaded.own_drafts is not None
        assert loaded.own_drafts.room == bytes_of["auto"]
        assert loaded.model.placement is not None
        assert loaded.model.placement.allocated() == found["auto"].plan.placement.allocated()
    finally:
        loaded.model.close()


def test_no_memory_is_planned_for_drafts_where_layers_on_a_gpu_capture_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = open_model(model_path("demo"), None, None)
    card = Tier("vram:0", 1 << 30, torch.device("cuda:0"))
    budget = MemoryBudget(1 << 34, (card,))
    with caplog.at_level(logging.INFO, logger="loci"):
        assert own_drafts_room("auto", opened, budget) == 0
    assert "no memory is planned for them" in caplog.text
    with pytest.raises(ConfigError, match=r"--drafts mtp: .* on GPUs .* use --devices none"):
        own_drafts_room("mtp", opened, budget)
    assert own_drafts_room("auto", opened, replace(budget, gpus=())) > 0


def test_the_plan_counts_keys_of_a_draft_layer() -> None:
    path = family_path("deepseek_v3")
    opened = open_model(path)
    asked = {"model": path, "devices": "none", "drafts": "mtp", "max_model_len": 200, "max_num_seqs": 3}
    found = planned(resolve_settings(asked), opened)
    loaded = opened.load(found.budget, drafts="mtp")
    try:
        assert loaded.own_drafts is not None
        drafter = loaded.own_drafts.drafter(3, 200)
        assert isinstance(drafter, Mtp)
        assert found.draft_keys >= 3 * drafter._cache.pages.nbytes(200) > 0
        assert found.workload.draft_bytes == loaded.own_drafts.room + found.draft_keys
        loaded.own_drafts.close()
    finally:
        loaded.model.close()


@pytest.mark.slow
def test_a_server_counts_and_asks_a_small_model_beside_its_own(start_server: StartServer) -> None:
    large = golden_path("v41-a")
    server = start_server(large, "--draft-model", TINY, "--devices", "none").await_ready()
    held = bytes_by_place(server, "loci_plan_allocated_bytes")
    planned_bytes = bytes_by_place(server, "loci_plan_bytes")
    assert held["dram", "drafts"] == planned_bytes["dram", "drafts"] > 1_000_000

    body = {"model": large.name, "prompt": "A test", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE_S).raise_for_status()
    assert found.json()["usage"]["completion_tokens"] == 20
    assert 'loci_drafted_tokens_total{drafter="model"}' in httpx.get(f"{server.url}/metrics").text


def test_a_small_model_that_nobody_may_ask_or_with_other_tokens_is_refused() -> None:
    large = golden_path("v41-a")
    opened = open_model(large, None, None)
    asked = {"model": large, "devices": "none", "draft_model": str(TINY)}
    with pytest.raises(ConfigError, match="--drafts off says that nobody does"):
        planned(resolve_settings({**asked, "drafts": "off"}), opened)
    with pytest.raises(ConfigError, match="has other tokens than"):
        planned(resolve_settings({**asked, "draft_model": "smollm2"}), opened)
