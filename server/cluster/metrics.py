"""What hops between stages take, and where replicas' sequences go, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.cluster.stages import StagedModel
from server.cluster.affinity import Affinity
from server.cluster.replicated import ReplicatedEngine


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


class ReplicaCollector(Collector):
    """Replicas that are up, what they were given and why, and what was given anew."""

    def __init__(self, affinity: Affinity, engine: ReplicatedEngine) -> None:
        self._affinity, self._engine = affinity, engine

    def collect(self) -> Iterator[Metric]:
        routed = self._affinity.routed
        sequences = CounterMetricFamily(
            "loci_replica_sequences",
            "Sequences that a replica was given, by what decided: prefix, it held part of the prompt; load, "
            "it was the least busy one.",
            labels=["replica", "by"],
        )
        for (replica, why), count in routed.sequences.items():
            sequences.add_metric([replica, why], count)
        tokens = CounterMetricFamily(
            "loci_replica_prefix_tokens",
            "Prompt tokens that a replica was expected to hold when it was chosen.",
            labels=["replica"],
        )
        for replica, count in routed.tokens.items():
            tokens.add_metric([replica], count)
        yield sequences
        yield tokens
        yield CounterMetricFamily(
            "loci_replica_retries", "Sequences that were given to another replica.", self._engine.retried
        )
        yield CounterMetricFamily(
            "loci_replicas_gone", "Replicas that died or were taken away.", self._affinity.gone
        )
        yield GaugeMetricFamily(
            "loci_replicas_up", "Replicas that can be given sequences.", self._affinity.up
        )
