"""What a long context costs: decoding and prefill by depth, bytes of KV, and memory against the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from engine.families.base import Batch, KvCache, Model, Segment
from engine.kv_pool import PoolSize, new_pool
from memory.hardware.detect import forget_peak, peak_resident_bytes, resident_bytes
from quant.errors import ConfigError

SEED = 0
WARM_STEPS = 2
PREFILLS = 2
COMPUTED_CHUNKS = 2
TOLD = 16 << 20  # bytes
MUCH = 1 << 20  # of the prompt is still to come where prefill is measured


@dataclass(frozen=True)
class Depth:
    """At a sequence of `tokens` tokens.

    computed     its first so many were computed; the rows behind them are theirs, over and over
    decode_s     of the next token; prefill_s: of a token of the next `chunk` ones, None where not measured
    kv_bytes     of its pages; planned_bytes: of all that the cache may take; grown_bytes: the most that the
                 process has taken more than before there was a cache
    """

    tokens: int
    computed: int
    decode_s: float
    prefill_s: float | None
    kv_bytes: int
    planned_bytes: int
    grown_bytes: int


@dataclass(frozen=True)
class ContextRun:
    """A run over several depths.

    row_bytes    by device, of what a token adds
    fixed_bytes  of what does not grow
    """

    depths: list[Depth]
    chunk: int
    row_bytes: dict[str, float]
    fixed_bytes: int

    def at(self, tokens: int) -> Depth | None:
        """The run at a depth."""
        return next((depth for depth in self.depths if depth.tokens == tokens), None)

    @property
    def peak_of_plan(self) -> float | None:
        """The most that the process took more, by what was planned for the deepest: the work space of steps,
        no part of a cache's plan, is in it. None where that is too little to be told from other things."""
        last = self.depths[-1]
        return None if last.planned_bytes < TOLD else last.grown_bytes / last.planned_bytes

    @property
    def growth_of_plan(self) -> float | None:
        """What the process took more at the deepest than at the depth before, by what was planned: the work
        space of steps is there at both. None where that is too little to be told from other things."""
        if len(self.depths) < 2:
            return None
        before, last = self.depths[-2:]
        planned = last.planned_bytes - before.planned_bytes
        return None if planned < TOLD else (last.grown_bytes - before.grown_bytes) / planned

    def decode_ratio(self, deep: int, base: int) -> float | None:
        """How much longer a token takes at one depth than at another."""
        one, other = self.at(deep), self.at(base)
        return None if one is None or other is None else one.decode_s / other.decode_s

    def prefill_ratio(self, deep: int, base: int) -> float | None:
        """The rate of prefill at one depth by that at another."""
        one, other = self.at(deep), self.at(base)
        if one is None or other is None or not one.prefill_s or not other.prefill_s:
            return None
        return other.prefill_s / one.prefill_s


def run_context(
    model: Model,
    depths: Sequence[int],
    *,
    steps: int,
    chunk: int,
    deepest_prefill: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ContextRun:
    """Decode and prefill one sequence at each of these depths, ascending, with memory for the deepest.

    Two chunks at most are computed; their rows are repeated behind them, since the prefill of a million
    tokens takes longer than anybody waits: what is read and chosen among is as much, only the choice means
    nothing. Prefill is measured up to `deepest_prefill`. Raises ConfigError for depths that the model cannot
    hold.
    """
    last = depths[-1] + chunk + WARM_STEPS + steps
    if last > model.info.max_context:
        raise ConfigError(
            f"a depth of {depths[-1]:,} tokens and {last - depths[-1]:,} more to measure are beyond the "
            f"{model.info.max_context:,} that {model.info.name} can; name smaller --depths"
        )
    generator = torch.Generator().manual_seed(SEED)
    base, found = min(depths[0], COMPUTED_CHUNKS * chunk), []
    needed = base + max(chunk, WARM_STEPS + steps)
    ids = torch.randint(3, model.info.vocab_size, (needed,), generator=generator).tolist()
    text, rest = ids[:base], ids[base:]
    told, prompt = rest[: WARM_STEPS + steps], rest[:chunk]  # at each depth
    _warm_up(model, text, told, chunk)
    before, _ = resident_bytes(), forget_peak()
    pool = new_pool(model, 1, last, PoolSize(), prefix_bytes=0)
    cache, pages = pool.cache, pool.cache.pages
    _prefill(model, cache, text, chunk)
    fixed = cache.nbytes - pages.nbytes(last)
    for number, depth in enumerate(depths):
        if depth > base:
            repeat_rows(cache, base, depth, start=max(base, depths[number - 1] if number else 0))
        prefill_s = None
        if depth <= deepest_prefill:
            prefill_s = _timed_prefill(model, cache, depth, prompt)
        decode_s = _timed_decode(model, cache, depth, told)
        planned = fixed + pages.nbytes(depth + chunk if prefill_s is not None else cache.length(0))
        grown = peak_resident_bytes() - before
        found.append(Depth(depth, base, decode_s, prefill_s, pages.nbytes(depth), planned, grown))
        on_progress(number + 1)
    rows = {str(device): pages.nbytes(last, device) / last for device in pages.devices}
    return ContextRun(found, chunk, rows, fixed)


def _warm_up(model: Model, text: list[int], told: list[int], chunk: int) -> None:
    """Prompts' and steps' work space exists, and what tokens read besides a cache has been read."""
    cache = model.new_cache(1, len(text) + len(told))
    _prefill(model, cache, text, chunk)
    _timed_decode(model, cache, len(text), told)


def _prefill(model: Model, cache: KvCache, ids: list[int], chunk: int) -> None:
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        model.forward(_amid(start, part, len(ids) - start - len(part)), cache)


def _amid(start: int, ids: list[int], to_come: int) -> Batch:
    """Tokens of a prompt of which so many more follow."""
    return Batch(ids, (Segment(0, start, len(ids)),), [], (to_come,))


def repeat_rows(cache: KvCache, base: int, depth: int, slot: int = 0, start: int | None = None) -> None:
    """Give a slot, of which `base` tokens were computed, a state of `depth`: their rows over and over. Those
    up to `start` are there already."""
    cache.pages.hold(slot, depth)
    for ratio, view in cache.appended(slot):
        rows, stop = base // ratio, depth // ratio
        at = (base if start is None else start) // ratio
        while rows and at < stop:
            first = at % rows
            count = min(rows - first, stop - at)
            view[at : at + count] = view[first : first + count]
            at += count
    cache.resume(slot, depth, depth)


def _timed_prefill(model: Model, cache: KvCache, depth: int, ids: list[int]) -> float:
    """Seconds of a token of a chunk after `depth` tokens; the slot is then as it was."""
    state = [part.clone() for part in cache.recent(0, depth)]
    seconds = []
    for _ in range(PREFILLS):
        begun = time.perf_counter()
        model.forward(_amid(depth, ids, MUCH), cache)
        seconds.append(time.perf_counter() - begun)
        for part, before in zip(cache.recent(0, depth), state, strict=True):
            part.copy_(before)
        cache.resume(0, depth, depth)
    return min(seconds) / len(ids)


def _timed_decode(model: Model, cache: KvCache, depth: int, ids: list[int]) -> float:
    """The median of the seconds of a step; the slot has more tokens then."""
    seconds = []
    for at, token in enumerate(ids):
        begun = time.perf_counter()
        model.forward(Batch.of([(0, depth + at, [token])]), cache)
        seconds.append(time.perf_counter() - begun)
    return median(seconds[WARM_STEPS:])
