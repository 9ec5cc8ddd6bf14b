"""A running server beside its plan: what was planned into each tier and what is there, what was expected and
what was measured; and what that teaches, in a file.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.engine import Engine
from engine.families.base import Model
from memory.hardware.this_machine import kept_rates
from memory.planner.calibration import ENOUGH_STEPS, Comparison, Learned, compare
from memory.planner.prefill import PrefillModel
from memory.planner.serving import routing_of
from memory.telemetry import Spans
from quant.errors import ConfigError
from server.serving.planned import Planned

log = logging.getLogger("loci")

KV = "kv"
EVERY_S = 60.0  # what was learned is written so often, and at the end


class PlanWatch:
    """The plan that a model was loaded by, and the model that runs; `draft_bytes` are kept for weights that
    guess tokens ahead. What loading and warming up took and moved before does not count."""

    def __init__(self, planned: Planned, model: Model, engine: Engine, draft_bytes: int = 0) -> None:
        self._planned = planned
        self._model = model
        self._draft_bytes = draft_bytes
        self._engine = engine
        plan = planned.plan
        self._expected = PrefillModel(planned.shape, plan.hardware, plan.placement, routing_of(planned.shape))
        self._before = model.times
        if model.telemetry is not None and model.expert_uses():
            model.of_answers = Spans(model.telemetry)

    def planned_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes by tier and part, as planned."""
        return self._planned.plan.placement.allocated()

    def allocated_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes by tier and part, as they are: of the KV, what its pool may take; of drafts, what is kept for
        their weights."""
        found = {tier: dict(parts) for tier, parts in self._model.held_bytes.items()}
        if self._draft_bytes:
            found.setdefault("dram", {})["drafts"] = self._draft_bytes
        for tier, nbytes in self._kv_bytes().items():
            found.setdefault(tier, {})[KV] = nbytes
        prefixes = self._engine.stats().prefixes
        if prefixes is not None:
            found.setdefault("dram", {})["prefixes"] = prefixes.budget_bytes
        return found

    def comparisons(self) -> list[Comparison]:
        """Expected and measured; none before some hundred steps."""
        moved = None if self._model.of_answers is None else self._model.of_answers.snapshot()
        return compare(self._expected, self._model.times.since(self._before), moved)

    def learned(self) -> Learned:
        """What plans to come can use."""
        ratios = {seen.what: seen.ratio for seen in self.comparisons() if seen.ratio is not None}
        return Learned(
            self._planned.shape.name,
            tuple(tuple(layer) for layer in self._model.expert_uses()),
            kept_rates(self._planned.machine, self._planned.disk),
            ratios,
        )

    def kv_on_gpus(self, rows: Mapping[torch.device, int]) -> dict[str, int]:
        """Bytes of KV on real GPUs by tier, given those of rows by device. What does not grow with sequences
        is taken at once, as planned."""
        placement = self._planned.plan.placement
        planned, of_rows = placement.kv_bytes(), placement.pool_bytes()
        return {
            gpu.name: rows.get(gpu.device, 0) + planned.get(gpu.name, 0) - of_rows.get(gpu.name, 0)
            for gpu in self._planned.budget.gpus
            if not gpu.is_virtual
        }

    def _kv_bytes(self) -> dict[str, int]:
        """What the KV takes, by tier: what does not grow, and the pool's budget. The share of a virtual GPU
        lies in host memory, and is told apart by the plan alone."""
        planned = self._planned.plan.placement.kv_bytes()
        pool = self._engine.pool
        program = pool.cache.program
        taken = pool.cache.nbytes - (0 if program is None else program.nbytes)
        others = {tier: nbytes for tier, nbytes in planned.items() if tier != "dram"}
        others |= self.kv_on_gpus(pool.by_device)
        return {**others, "dram": max(0, taken - sum(others.values()))} if planned else {}


class PlanCollector(Collector):
    """`PlanWatch` for Prometheus."""

    def __init__(self, watch: PlanWatch) -> None:
        self._watch = watch

    def collect(self) -> Iterator[Metric]:
        for name, text, tiers in (
            ("loci_plan_bytes", "Bytes that the plan puts into a tier.", self._watch.planned_bytes()),
            ("loci_plan_allocated_bytes", "Bytes that were allocated there.", self._watch.allocated_bytes()),
        ):
            family = GaugeMetricFamily(name, text, labels=["tier", "part"])
            for tier, parts in tiers.items():
                for part, nbytes in parts.items():
                    family.add_metric([tier, part], nbytes)
            yield family
        seen = self._watch.comparisons()
        expected = GaugeMetricFamily(
            "loci_plan_expected", "What the plan expects of steps.", labels=["what", "unit"]
        )
        measured = GaugeMetricFamily("loci_plan_measured", "The same, measured.", labels=["what", "unit"])
        ratio = GaugeMetricFamily("loci_plan_ratio", "Measured by expected.", labels=["what"])
        for found in seen:
            expected.add_metric([found.what, found.unit], found.planned)
            measured.add_metric([found.what, found.unit], found.measured)
            if found.ratio is not None:
                ratio.add_metric([found.what], found.ratio)
        yield from (expected, measured, ratio)


class LearnedFile:
    """Writes what was learned to a file, once a minute and at the end."""

    def __init__(self, path: Path, watch: PlanWatch) -> None:
        self._path = path
        self._watch = watch
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loci-learned", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write it for the last time."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._stopping.wait(EVERY_S)
            if self._watch.comparisons():
                try:
                    self._watch.learned().write(self._path)
                except ConfigError as error:
                    log.warning("%s", error)  # and again in a minute: a disk that is full may not stay so
            elif is_over:
                log.info("%s: not written, since fewer than %d steps were made", self._path, ENOUGH_STEPS)


def by_part(tiers: dict[str, dict[str, int]]) -> dict[str, int]:
    """Bytes of each part in all tiers."""
    found: dict[str, int] = defaultdict(int)
    for parts in tiers.values():
        for part, nbytes in parts.items():
            found[part] += nbytes
    return dict(found)
