"""What is measured beside the plan: steps of answers alone, since the server was ready."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from engine.engine import Engine, EngineStats
from engine.families.base import Batch, KvCache, Model
from memory.planner.calibration import ENOUGH_STEPS, Comparison, Learned
from memory.tiers import Tier
from quant.errors import ConfigError
from server import plan_metrics
from server.metrics import Metrics
from server.plan_metrics import LearnedFile, PlanWatch
from server.serving.service import bring_up, prepare
from server.settings import resolve_settings
from tests.server.harness import TINY, eventually

TIERED = {"dram_budget": "1.34MB", "devices": "virtual:64KB@100MB/s,virtual:64KB@100MB/s"}
PROMPT = 24


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and what is expected does not matter here."""
    monkeypatch.setattr("server.serving.planned.known_rates", lambda machine, file: {})


@contextmanager
def watched(**settings: str) -> Iterator[tuple[PlanWatch, Model]]:
    """A model that was loaded to be served, and its watch."""
    served = bring_up(prepare(resolve_settings({"model": TINY, "drafts": "off", **settings})))
    try:
        assert served.watch is not None
        yield served.watch, served.loaded.model
    finally:
        served.engine.stop()


def answer(model: Model, cache: KvCache) -> None:
    """A prompt, and enough steps of its answer."""
    cache.reset(0)
    model.forward(Batch.of([(0, 0, list(range(3, 3 + PROMPT)))]), cache)
    for at in range(PROMPT, PROMPT + ENOUGH_STEPS):
        model.forward(Batch.of([(0, at, [3 + at % 50])]), cache)


def test_nothing_was_read_from_disk_by_steps_of_a_model_in_memory() -> None:
    with watched(devices="virtual:64KB") as (watch, model):
        assert model.telemetry is not None
        assert model.telemetry.snapshot().moved_bytes["nvme"] > 0  # by loading
        answer(model, model.new_cache(1, 256))
        found = {seen.what: seen.measured for seen in watch.comparisons()}
        assert found["hits in vram"] + found["hits in dram"] == 1.0
        assert found.keys().isdisjoint({"read from disk", "waits for disk"})


def test_what_loading_and_prompts_move_is_not_what_answers_move() -> None:
    with watched(**TIERED) as (watch, model):
        assert model.telemetry is not None
        assert model.of_answers is not None
        assert not any(model.of_answers.snapshot().moved_bytes.values())
        cache = model.new_cache(1, 256)
        model.forward(Batch.of([(0, 0, list(range(3, 3 + PROMPT)))]), cache)
        assert not any(model.of_answers.snapshot().hits.values())

        answer(model, cache)
        shape, counted = watch._planned.shape, model.of_answers.snapshot()
        of_each_token = shape.top_k * sum(layer.experts > 0 for layer in shape.layers)
        assert sum(counted.hits.values()) == of_each_token * ENOUGH_STEPS
        measured = {seen.what: seen.measured for seen in watch.comparisons()}
        assert measured["read from disk"] == counted.moved_bytes["nvme"] / ENOUGH_STEPS
        assert sum(share for what, share in measured.items() if what.startswith("hits")) == pytest.approx(1.0)


def test_steps_before_the_watch_do_not_count() -> None:
    with watched(devices="none") as (watch, model):
        answer(model, model.new_cache(1, 256))
        assert watch.comparisons()
        again = PlanWatch(watch._planned, model, watch._engine)
        assert again.comparisons() == []


CARD = torch.device("cuda:0")


def with_a_card(watch: PlanWatch, engine: Engine) -> PlanWatch:
    """A watch of the same server, as if some of its rows were on a real GPU."""
    planned = watch._planned
    card = Tier("vram:0", 1 << 30, CARD)
    return PlanWatch(replace(planned, budget=replace(planned.budget, gpus=(card,))), watch._model, engine)


def test_kv_on_a_gpu_is_counted_there_as_the_pool_has_it() -> None:
    with watched(devices="none") as (watch, model):
        engine = watch._engine
        before = watch.allocated_bytes()["dram"]["kv"]
        pages = engine.pool.cache.pages
        assert pages.budgets is not None
        (host,) = pages.budgets
        pages.budgets = {host: pages.budgets[host] - 5000, CARD: 5000}
        seen = with_a_card(watch, engine)
        found = seen.allocated_bytes()
        assert (found["vram:0"]["kv"], found["dram"]["kv"]) == (5000, before - 5000)

        stats = replace(engine.stats(), kv_taken=(9000, 0), kv_on={host: 6000, CARD: 3000})
        assert held_kv(stats, model, seen)["vram:0"] == 3000
        assert sum(held_kv(stats, model, seen).values()) == held_kv(stats, model, None)["dram"]


def held_kv(stats: EngineStats, model: Model, watch: PlanWatch | None) -> dict[str, float]:
    """`loci_tier_memory_bytes` of the KV, by tier."""
    metrics = Metrics()
    metrics.observe_engine(lambda: stats, model, *([] if watch is None else [watch.kv_on_gpus]))
    families = text_string_to_metric_families(metrics.render().decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        sample.labels["tier"]: sample.value
        for sample in samples
        if sample.name == "loci_tier_memory_bytes" and sample.labels["content"] == "kv"
    }


class LearningWatch(PlanWatch):
    """Has learned something that the disk has no room for at first."""

    def __init__(self) -> None:
        self.failures = 2

    def comparisons(self) -> list[Comparison]:
        return [Comparison("decode", "s/step", 1.0, 1.1)]

    def learned(self) -> Learned:
        self.failures -= 1
        if self.failures >= 0:
            raise ConfigError("no space left")
        return Learned("a model", ratios={"decode": 1.1})


def test_what_was_learned_is_written_once_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_metrics, "EVERY_S", 0.001)
    file = tmp_path / "learned.json"
    learned = LearnedFile(file, LearningWatch())
    eventually(file.exists, "a file")
    learned.close()
    assert json.loads(file.read_text())["ratios"] == {"decode": 1.1}
