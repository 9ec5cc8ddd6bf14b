"""What Prometheus sees: counters and histograms of requests, gauges of the engine, memory by tier."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.cache.aside import AsideStats
from engine.cache.stored_states import StoredStats
from engine.drafts.stats import DraftStats
from engine.engine import EngineStats
from engine.families.base import Model
from engine.output import Output
from memory.hardware.detect import resident_bytes
from memory.telemetry import Snapshot

# Seconds. A local model may take minutes to read a long prompt and is never faster than a millisecond.
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
_TOKEN_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)

# Bytes of KV on real GPUs by tier, given those of rows by device.
KvOnGpus = Callable[[Mapping[torch.device, int]], Mapping[str, int]]


class Metrics:
    """All metrics of one server, in a registry of their own. Safe to use from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self.requests = Counter(
            "loci_http_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.key_requests = Counter(
            "loci_key_requests", "Requests answered, by API key.", ["key", "status"], registry=self.registry
        )
        self.key_tokens = Counter(
            "loci_key_tokens",
            "Tokens of prompts and answers, by API key.",
            ["key", "kind"],
            registry=self.registry,
        )
        self.key_refusals = Counter(
            "loci_key_refusals",
            "Requests refused because a key reached its limit.",
            ["key", "limit"],
            registry=self.registry,
        )
        self.queue_time = histogram(
            "loci_queue_time_seconds",
            "Time from submission until a sequence is first scheduled.",
            _LATENCY,
        )
        self.first_token = histogram(
            "loci_time_to_first_token_seconds", "Time from submission to a sequence's first token.", _LATENCY
        )
        self.token_gap = histogram(
            "loci_inter_token_latency_seconds",
            "Time between tokens of a sequence after its first.",
            _TOKEN_LATENCY,
        )
        self.end_to_end = histogram(
            "loci_end_to_end_seconds", "Time from submission to a sequence's last token.", _LATENCY
        )

    def expect_requests(self, route: str, *, computes: bool) -> None:
        """Begin to count a route's requests at 0: what appears with its first error has no rate before it."""
        for status in ("200", "400", "429", "500", "503", "504") if computes else ("200", "500", "503"):
            self.requests.labels(route, status)

    def expect_key(self, name: str, limits: Iterable[str]) -> None:
        """Begin to count at 0 what a key asks for."""
        for status in ("200", "400", "429", "500"):
            self.key_requests.labels(name, status)
        for kind in ("prompt", "generated"):
            self.key_tokens.labels(name, kind)
        for limit in limits:
            self.key_refusals.labels(name, limit)

    def observe_engine(
        self, stats: Callable[[], EngineStats], model: Model, kv_on_gpus: KvOnGpus = lambda rows: {}
    ) -> None:
        """From now on report the engine's counters, the memory of each tier, and what moves between them."""
        self.registry.register(_EngineCollector(stats, model, kv_on_gpus))

    def observe_process(self) -> None:
        """Report the process's memory at each scrape."""
        self.registry.register(_ProcessCollector())

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self.registry)


class SequenceTimer:
    """Times one sequence: fed with each Output as it leaves the engine, observes into the histograms."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._submitted = time.perf_counter()
        self._last_token: float | None = None

    def observe(self, output: Output) -> None:
        """Note the arrival of `output`."""
        now = time.perf_counter()
        if output.queue_s is not None:
            self._metrics.queue_time.observe(output.queue_s)
        for _ in output.token_ids:
            if self._last_token is None:
                self._metrics.first_token.observe(now - self._submitted)
            else:
                self._metrics.token_gap.observe(now - self._last_token)
            self._last_token = now
        if output.finish_reason is not None:
            self._metrics.end_to_end.observe(now - self._submitted)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats], model: Model, kv_on_gpus: KvOnGpus) -> None:
        self._stats = stats
        self._model = model
        self._kv_on_gpus = kv_on_gpus

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        yield GaugeMetricFamily("loci_sequences_running", "Sequences being computed.", now.running)
        yield GaugeMetricFamily("loci_sequences_waiting", "Sequences in the queue.", now.waiting)
        yield CounterMetricFamily("loci_prompt_tokens", "Prompt tokens computed.", now.prompt_tokens)
        yield CounterMetricFamily("loci_generated_tokens", "Tokens generated.", now.generated_tokens)
        yield CounterMetricFamily("loci_engine_steps", "Steps of the engine's loop.", now.steps)
        yield CounterMetricFamily("loci_engine_step_seconds", "Time spent in steps.", now.step_s)
        yield CounterMetricFamily(
            "loci_engine_forward_seconds",
            "Time spent in the model's forward pass, part of the step time.",
            now.forward_s,
        )
        yield GaugeMetricFamily("loci_kv_tokens_used", "Tokens in the KV cache.", now.kv_tokens_used)
        yield GaugeMetricFamily(
            "loci_kv_tokens_capacity", "Capacity of the KV cache in tokens.", now.kv_tokens_capacity
        )
        yield from _kv_bytes(now)
        prefixes = now.prefixes
        if prefixes is not None:
            for name, text, count in (
                ("queries", "Prompts looked up in the prefix cache.", prefixes.queries),
                ("hits", "Prompts that hit the prefix cache.", prefixes.hits),
                ("tokens", "Prompt tokens served from the prefix cache.", prefixes.cached_tokens),
                ("evictions", "States evicted from the prefix cache.", prefixes.evictions),
            ):
                yield CounterMetricFamily(f"loci_prefix_cache_{name}", text, count)
            yield GaugeMetricFamily(
                "loci_prefix_cache_bytes", "Size of the prefix cache in bytes.", prefixes.nbytes
            )
            yield GaugeMetricFamily(
                "loci_prefix_cache_budget_bytes",
                "Budget of the prefix cache in bytes.",
                prefixes.budget_bytes,
            )
        yield from _states_on_disk(now.stored or StoredStats())
        if now.drafts is not None:
            yield from _drafts(now.drafts)
        tiers = GaugeMetricFamily(
            "loci_tier_memory_bytes",
            "Bytes allocated in a memory tier, by content.",
            labels=["tier", "content"],
        )
        for tier, nbytes in self._model.tier_bytes.items():
            tiers.add_metric([tier, "weights"], nbytes)
        untaken = now.kv_budget_bytes - sum(now.kv_taken)
        in_prefixes = 0 if prefixes is None else prefixes.nbytes
        on_gpus = self._kv_on_gpus(now.kv_on)
        for tier, nbytes in on_gpus.items():
            tiers.add_metric([tier, "kv"], nbytes)
        on_host = now.kv_bytes - untaken - sum(on_gpus.values())
        tiers.add_metric(["dram", "kv"], max(on_host, 0) + in_prefixes)
        yield tiers
        experts = GaugeMetricFamily(
            "loci_experts",
            "Routed experts, by the tier that holds them (nvme: on disk only).",
            labels=["tier"],
        )
        held = collections.Counter(tier for layer in self._model.expert_tiers() for tier in layer)
        for tier, count in held.items():
            experts.add_metric([tier], count)
        yield experts
        if self._model.telemetry is not None:
            yield from _movements(self._model.telemetry.snapshot())


def _drafts(now: DraftStats) -> Iterator[Metric]:
    """Tokens guessed ahead."""
    drafted = CounterMetricFamily(
        "loci_drafted_tokens", "Tokens guessed ahead that steps computed, by drafter.", labels=["drafter"]
    )
    accepted = CounterMetricFamily(
        "loci_accepted_draft_tokens", "Of these, tokens that were right.", labels=["drafter"]
    )
    steps = CounterMetricFamily(
        "loci_draft_steps",
        "Drafts that steps computed, by drafter and by how many of their tokens were right.",
        labels=["drafter", "accepted"],
    )
    for name, of_one in now.by_drafter.items():
        drafted.add_metric([name], of_one.drafted)
        accepted.add_metric([name], of_one.accepted)
        for count, times in enumerate(of_one.lengths):
            steps.add_metric([name, str(count)], times)
    yield from (drafted, accepted, steps)
    for name, text, seconds in (
        ("loci_drafting_seconds", "Time spent on guessing.", now.drafting_s),
        ("loci_drafts_gained_seconds", "Time that steps with drafts gained.", now.gained_s),
        ("loci_drafts_lost_seconds", "Time that steps with drafts lost.", now.lost_s),
    ):
        yield CounterMetricFamily(name, text, seconds)


def _kv_bytes(now: EngineStats) -> Iterator[Metric]:
    """The pages of the KV pool."""
    of_slots = GaugeMetricFamily(
        "loci_kv_slot_bytes",
        "Memory that the sequence in a slot has taken from the KV pool.",
        labels=["slot"],
    )
    for slot, nbytes in enumerate(now.kv_taken):
        of_slots.add_metric([str(slot)], nbytes)
    yield of_slots
    yield GaugeMetricFamily("loci_kv_bytes", "Memory taken from the KV pool.", sum(now.kv_taken))
    yield GaugeMetricFamily(
        "loci_kv_peak_bytes", "The most that was ever taken from the KV pool.", now.kv_peak_bytes
    )
    yield GaugeMetricFamily(
        "loci_sequences_aside", "Waiting sequences that were put aside.", now.sequences_aside
    )
    aside = now.aside or AsideStats()
    times = CounterMetricFamily(
        "loci_put_aside",
        "Sequences put aside while the KV pool was short, by where their state went (again: nowhere).",
        labels=["place"],
    )
    held = GaugeMetricFamily("loci_aside_bytes", "States of sequences put aside.", labels=["place"])
    for place, count in (("dram", aside.dram), ("disk", aside.disk), ("again", aside.again)):
        times.add_metric([place], count)
    held.add_metric(["dram"], aside.dram_bytes)
    held.add_metric(["disk"], aside.disk_bytes)
    yield from (times, held)
    yield GaugeMetricFamily("loci_kv_budget_bytes", "Size of the KV pool.", now.kv_budget_bytes)


def _movements(seen: Snapshot) -> Iterator[Metric]:
    """What was hit, moved and waited for, one counter for each field of Snapshot."""

    def counter(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        return family

    def by_reason(name: str, text: str, values: Mapping[str, float]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["link", "reason"])
        for key, value in values.items():
            link, _, reason = key.rpartition(" ")
            family.add_metric([link, reason], value)
        return family

    yield counter("loci_expert_hits", "Expert uses by the tier that held the expert.", "tier", seen.hits)
    yield counter("loci_experts_computed", "Experts computed, by tier.", "tier", seen.computed)
    yield counter("loci_expert_evictions", "Experts evicted from a tier.", "tier", seen.evictions)
    yield counter("loci_expert_guesses", "Experts predicted a layer ahead.", "guesses", seen.guesses)
    yield counter("loci_prefetched_experts", "Prefetched experts, by outcome.", "outcome", seen.prefetches)
    slots = GaugeMetricFamily("loci_expert_slots_free", "Empty expert slots.", labels=["tier"])
    for tier, free in seen.slots.items():
        slots.add_metric([tier], free)
    yield slots
    yield counter("loci_link_bytes", "Bytes transferred, by link.", "link", seen.moved_bytes)
    yield counter("loci_link_busy_seconds", "Time a link spent transferring.", "link", seen.busy_s)
    yield by_reason("loci_link_transfers", "Transfers, by link and reason.", seen.moves)
    yield by_reason("loci_link_failures", "Failed transfers, by link and reason.", seen.failed)
    yield by_reason(
        "loci_stall_seconds", "Time computation stalled on transfers, by link and reason.", seen.stalled_s
    )
    yield counter("loci_engram_rows", "Engram rows, by where they were found.", "rows", seen.rows)


def _states_on_disk(now: StoredStats) -> Iterator[Metric]:
    for name, text, count in (
        ("hits", "Prompts of which a state was read from disk.", now.hits),
        ("tokens", "Prompt tokens served from states on disk.", now.cached_tokens),
        ("written", "States written to disk.", now.written),
        ("evictions", "States removed from disk to make room for newer ones.", now.evictions),
        ("refused", "States not written: memory for them was full, or writing failed.", now.refused),
    ):
        yield CounterMetricFamily(f"loci_prefix_disk_{name}", text, count)
    yield GaugeMetricFamily("loci_prefix_disk_bytes", "Size of the states on disk in bytes.", now.nbytes)
    yield GaugeMetricFamily("loci_prefix_disk_budget_bytes", "Budget of these states.", now.budget_bytes)


class _ProcessCollector(Collector):
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "loci_process_resident_memory_bytes", "Resident memory of the process.", resident_bytes()
        )
