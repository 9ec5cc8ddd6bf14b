"""What hops between stages take, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.cluster.stages import StagedModel


class StageCollector(Collector):
    """Seconds that stages compute, seconds between them, and bytes that they hand on."""

    def __init__(self, model: StagedModel) -> None:
        self._model = model

    def collect(self) -> Iterator[Metric]:
        hops = self._model.hops
        seconds = CounterMetricFamily("loci_stage_seconds", "Time that a stage computed.", labels=["stage"])
        nbytes = CounterMetricFamily(
            "loci_stage_bytes", "Bytes that a stage handed on, the last one's as logits.", labels=["stage"]
        )
        for number, (computed, handed) in enumerate(zip(hops.computed, hops.nbytes, strict=True)):
            seconds.add_metric([str(number)], computed)
            nbytes.add_metric([str(number)], handed)
        yield seconds
        yield nbytes
        yield CounterMetricFamily(
            "loci_stage_steps_seconds", "Time of steps, with what passes between stages.", hops.seconds
        )
        yield CounterMetricFamily("loci_stage_steps", "Steps through all stages.", hops.steps)
        yield CounterMetricFamily("loci_stages_lost", "Times that a stage was lost.", hops.lost)
        yield GaugeMetricFamily("loci_stages_up", "Whether all stages answer.", float(self._model.is_up))
