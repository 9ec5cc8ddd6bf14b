"""Figures of several engines as those of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from engine.cache.prefixes import PrefixStats
from engine.engine import EngineStats


def total(every: Iterable[EngineStats]) -> EngineStats:
    """All of them together, slots behind each other. Drafts and states on disk are left out."""
    found = list(every)
    prefixes = [stats.prefixes for stats in found if stats.prefixes is not None]
    return EngineStats(
        running=sum(stats.running for stats in found),
        waiting=sum(stats.waiting for stats in found),
        prompt_tokens=sum(stats.prompt_tokens for stats in found),
        generated_tokens=sum(stats.generated_tokens for stats in found),
        steps=sum(stats.steps for stats in found),
        kv_tokens_used=sum(stats.kv_tokens_used for stats in found),
        kv_tokens_capacity=sum(stats.kv_tokens_capacity for stats in found),
        kv_bytes=sum(stats.kv_bytes for stats in found),
        step_s=sum(stats.step_s for stats in found),
        forward_s=sum(stats.forward_s for stats in found),
        prefixes=PrefixStats(*map(sum, zip(*map(_fields, prefixes), strict=True))) if prefixes else None,
        is_failing=any(stats.is_failing for stats in found),
        kv_taken=tuple(taken for stats in found for taken in stats.kv_taken),
        kv_peak_bytes=sum(stats.kv_peak_bytes for stats in found),
        kv_budget_bytes=sum(stats.kv_budget_bytes for stats in found),
        sequences_aside=sum(stats.sequences_aside for stats in found),
    )


def counted(stats: EngineStats) -> EngineStats:
    """What remains of an engine that has ended: what it has counted, and nothing of what it held."""
    prefixes = stats.prefixes and replace(stats.prefixes, nbytes=0, budget_bytes=0)
    return EngineStats(
        running=0,
        waiting=0,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
        steps=stats.steps,
        kv_tokens_used=0,
        kv_tokens_capacity=0,
        kv_bytes=0,
        step_s=stats.step_s,
        forward_s=stats.forward_s,
        prefixes=prefixes,
    )


def _fields(stats: PrefixStats) -> tuple[int, ...]:
    return (
        stats.queries,
        stats.hits,
        stats.cached_tokens,
        stats.evictions,
        stats.nbytes,
        stats.budget_bytes,
    )
