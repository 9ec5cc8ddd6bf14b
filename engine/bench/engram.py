"""What Engram tables cost a step: the same decodes and prompts without, from DRAM, and from disk.

The forward is a real one; only the store behind its lookups changes. Without means zeros that are there
at once. Rows follow from token ids, so their skew is that of the tokens: uniform ones repeat nothing, those
of a Zipf law repeat as words do. Or they are those that a text has asked for, from a trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from statistics import median, quantiles
from typing import Protocol

import numpy as np
import torch

from engine.families.base import Batch
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import load, open_checkpoint
from engine.layers.engram_lookup import EngramLookup, Store
from memory.engram.store import EngramStore, ReadyRows
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.telemetry import Telemetry
from quant.errors import ConfigError

ABSENT, DRAM, NVME = PLACES = "absent", "dram", "nvme"
ORDERS = list(permutations(range(len(PLACES))))
KINDS = ("decode", "prefill")
UNIFORM, ZIPF, RECORDED = "uniform", "zipf", "recorded"
HOT_SHARE = 10  # on disk, the hot cache holds one part in so many of the table
FIRST_TOKEN = 3
SINGLE_LOOKUPS = 300
WARM_CHUNK = 2048  # tokens of a lookup while the hot cache fills


class _NoTable:
    """A store whose every row is zeros that are there already, where its layer is; `most` rows at once."""

    def __init__(self, most: int, dim: int, devices: Mapping[int, torch.device]) -> None:
        self._zeros = {layer: torch.zeros(most, dim, device=device) for layer, device in devices.items()}

    def lookup(self, layer: int, rows: torch.Tensor) -> ReadyRows:
        """Zeros `[n, dim]`."""
        return ReadyRows(self._zeros[layer][: len(rows)])


@dataclass(frozen=True)
class EngramCase:
    """What each of two or more rounds does, and how many tokens' rows are looked up before."""

    rounds: int
    decode_tokens: int
    prompt_tokens: int
    warm_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of a round."""
        return self.prompt_tokens + self.decode_tokens


@dataclass
class EngramRun:
    """Seconds by (where the table is, skew of its rows), each beside those of the other places.

    decode   every decoded token
    prefill  every round's prompt
    lookups  a decoded token's rows of all tables, nothing else going on
    hits     rows found in DRAM, of the distinct ones asked for while the rounds ran
    """

    table_bytes: int
    hot_bytes: int
    rows_a_token: int
    decode: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    prefill: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    lookups: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    hits: dict[tuple[str, str], float] = field(default_factory=dict)

    def penalty(self, where: str, skew: str, kind: str) -> float:
        """The part by which `decode` or `prefill` is slower than without the table, median of all pairs."""
        return float(median(self._pairs(where, skew, kind)))

    def doubt(self, where: str, skew: str, kind: str) -> float:
        """The standard error of `penalty`, from the half of the pairs in the middle."""
        pairs = self._pairs(where, skew, kind)
        low, _, high = quantiles(pairs, n=4)
        return float((high - low) / len(pairs) ** 0.5)

    def _pairs(self, where: str, skew: str, kind: str) -> list[float]:
        times: dict[tuple[str, str], list[float]] = getattr(self, kind)
        pairs = zip(times[where, skew], times[ABSENT, skew], strict=True)
        return [with_table / without - 1 for with_table, without in pairs]

    def worst_penalty(self, where: str) -> float:
        """The largest of a place's penalties."""
        skews = [skew for place, skew in self.hits if place == where]
        return max(self.penalty(where, skew, kind) for skew in skews for kind in KINDS)


def _engram_of(model: DeepseekV41) -> EngramLookup:
    assert model.engram is not None
    return model.engram


class _Source(Protocol):
    """What the rounds, and lookups before and after them, ask for; the same for every store."""

    skew: str

    def warm(self) -> Iterator[torch.Tensor]:
        """Rows that are looked up first, piece by piece, `[tables, tokens, columns]`."""
        ...

    def single(self) -> torch.Tensor:
        """Rows of tokens that are looked up alone, `[tables, tokens, columns]`."""
        ...

    def round(self, number: int, store: Store) -> tuple[list[int], EngramLookup]:
        """Token ids of a round, prompt and answer, and what looks up their rows."""
        ...


class _Drawn:
    """Random tokens of one skew."""

    def __init__(self, model: DeepseekV41, case: EngramCase, skew: str) -> None:
        self.skew = skew
        self._model = model
        self._engram = _engram_of(model)
        self._case = case
        ranks = torch.arange(1, model.info.vocab_size - FIRST_TOKEN + 1, dtype=torch.float64)
        self._shares = (ranks if skew == ZIPF else torch.ones_like(ranks)).reciprocal()

    def warm(self) -> Iterator[torch.Tensor]:
        generator, count = torch.Generator().manual_seed(1), self._case.warm_tokens
        for begin in range(0, count, WARM_CHUNK):
            yield self._rows(self._draw(min(WARM_CHUNK, count - begin), generator))

    def single(self) -> torch.Tensor:
        return self._rows(self._draw(SINGLE_LOOKUPS, torch.Generator().manual_seed(9)))

    def round(self, number: int, store: Store) -> tuple[list[int], EngramLookup]:
        lookup = EngramLookup(self._engram.layers, self._engram.hashing, store)
        return self._draw(self._case.tokens, torch.Generator().manual_seed(1000 + number)), lookup

    def _draw(self, count: int, generator: torch.Generator) -> list[int]:
        drawn = torch.multinomial(self._shares, count, replacement=True, generator=generator)
        ids: list[int] = (drawn + FIRST_TOKEN).tolist()
        return ids

    def _rows(self, ids: list[int]) -> torch.Tensor:
        """The rows that a text asks for, `[tables, tokens, columns]`."""
        shape = self._model.cache_shape
        keys = self._model.token_map.numpy()[ids]
        window = np.concatenate((np.full(shape.history, shape.history_pad), keys))
        return torch.from_numpy(self._engram.rows_of(self._engram.windows([window])))


class _RecordedLookup(EngramLookup):
    """Asks for the rows of a trace `[tables, tokens, columns]` in turn, whatever the tokens are."""

    def __init__(self, like: EngramLookup, store: Store, rows: torch.Tensor) -> None:
        super().__init__(like.layers, like.hashing, store)
        self._recorded = rows.numpy()
        self._at = 0

    def rows_of(self, windows: np.ndarray) -> np.ndarray:
        begin = self._at
        self._at += len(windows)
        return self._recorded[:, begin : self._at]


class _Recorded:
    """A trace's rows: its last tokens for rounds and single lookups, those before them to warm up."""

    skew = RECORDED

    def __init__(self, model: DeepseekV41, case: EngramCase, trace: torch.Tensor) -> None:
        """Raises ConfigError where the trace is another model's or too short."""
        sizes = [files.rows for files in model.weights.engram.files.values()]
        like = (len(sizes), _engram_of(model).columns)
        if tuple(trace.shape[1:]) != like or (trace.amax((0, 2)) >= torch.tensor(sizes)).any():
            raise ConfigError(
                f"the trace was recorded with another model: {trace.shape[2]} rows per token from "
                f"{trace.shape[1]} tables, up to row {int(trace.max())}; {model.info.name} reads {like[1]} "
                f"from tables of {', '.join(map(str, sizes))} rows"
            )
        needed = case.rounds * case.tokens + SINGLE_LOOKUPS
        if len(trace) < needed:
            raise ConfigError(f"the trace has {len(trace)} tokens, the rounds need {needed}; ask for fewer")
        self._engram = _engram_of(model)
        self._case = case
        self._rows = trace.transpose(0, 1)
        self._first = len(trace) - needed

    def warm(self) -> Iterator[torch.Tensor]:
        begin = max(0, self._first - self._case.warm_tokens)
        yield from torch.split(self._rows[:, begin : self._first], WARM_CHUNK, dim=1)

    def single(self) -> torch.Tensor:
        return self._rows[:, -SINGLE_LOOKUPS:]

    def round(self, number: int, store: Store) -> tuple[list[int], EngramLookup]:
        begin, count = self._first + number * self._case.tokens, self._case.tokens
        lookup = _RecordedLookup(self._engram, store, self._rows[:, begin : begin + count])
        return list(range(FIRST_TOKEN, FIRST_TOKEN + count)), lookup


def run_engram(
    path: Path,
    case: EngramCase,
    on_progress: Callable[[int, int], None],
    trace: torch.Tensor | None = None,
    devices: str | None = None,
) -> EngramRun:
    """Measure the checkpoint at `path`; its tables, and a tenth of them once more, must fit beside the model.

    Each prompt and each token is computed with every store in turn, so that what disturbs one disturbs all.
    Rows are those of a trace `[tokens, tables, columns]`, or of random tokens; layers on GPUs (`devices`, as
    `loci serve` takes them) have them sent there. Raises ConfigError for a model without tables or without
    room to hold them, a trace that is not of this model, and what loading raises.
    """
    workload = Workload(case.tokens, len(PLACES), case.prompt_tokens)
    budget = MemoryBudget.of_this_machine(devices=devices, workload=workload)
    model = load(path, budget).model
    try:
        if not isinstance(model, DeepseekV41) or model.engram is None:
            raise ConfigError(f"{path}: this model has no Engram tables")
        whole = model.weights.engram
        table_bytes = sum(files.nbytes for files in whole.files.values())
        if whole.nbytes < table_bytes:
            raise ConfigError(
                f"{path}: tables of {table_bytes / 1e9:.1f} GB do not fit in memory next to the model; use "
                "a slice with fewer rows"
            )
        sources: list[_Source]
        if trace is None:
            sources = [_Drawn(model, case, skew) for skew in (UNIFORM, ZIPF)]
        else:
            sources = [_Recorded(model, case, trace)]
        telemetry = Telemetry()
        by_name = {gpu.name: gpu for gpu in budget.gpus}
        tiers = model.weights.places.tiers
        on_disk = EngramStore(
            whole.files,
            open_checkpoint(path),
            model.kernels,
            {layer: files.share(files.nbytes // HOT_SHARE) for layer, files in whole.files.items()},
            telemetry,
            gpus={layer: by_name[tier] for layer, tier in enumerate(tiers) if tier in by_name},
        )
        try:
            bench = _Bench(model, case, whole, on_disk, {DRAM: model.telemetry, NVME: telemetry})
            return bench.run(sources, on_progress)
        finally:
            on_disk.close()
    finally:
        model.close()


class _Bench:
    def __init__(
        self,
        model: DeepseekV41,
        case: EngramCase,
        whole: EngramStore,
        on_disk: EngramStore,
        telemetry: dict[str, Telemetry],
    ) -> None:
        self._model = model
        self._case = case
        engram = _engram_of(model)
        self._layers = engram.layers
        columns = engram.columns
        devices = {layer: model.weights.layers[layer].device for layer in self._layers}
        absent = _NoTable(case.prompt_tokens * columns, model.config.engram_head_dim, devices)
        self._stores: dict[str, Store] = {ABSENT: absent, DRAM: whole, NVME: on_disk}
        self._telemetry = telemetry
        # Rows of every place are asked for: in DRAM, native code would find them by itself, in less time.
        model.parts = replace(model.parts, ngrams=None)
        self._cache = model.new_cache(len(PLACES), case.tokens)
        tables = sum(files.nbytes for files in whole.files.values())
        self._run = EngramRun(tables, on_disk.nbytes, columns * len(self._layers))

    def run(self, sources: Sequence[_Source], on_progress: Callable[[int, int], None]) -> EngramRun:
        run, rounds = self._run, self._case.rounds
        done, total = 0, rounds * len(sources)
        for source in sources:
            for rows in source.warm():
                self._look_up(NVME, rows)
            before = {where: t.snapshot().rows for where, t in self._telemetry.items()}
            for number in range(rounds):
                self._round(source, number)
                done += 1
                on_progress(done, total)
            for where, telemetry in self._telemetry.items():
                seen = telemetry.snapshot().rows
                asked = seen.get("unique", 0) - before[where].get("unique", 0)
                cached = seen.get("cached", 0) - before[where].get("cached", 0)
                run.hits[where, source.skew] = cached / max(1, asked)
                run.lookups[where, source.skew] = self._single_lookups(where, source.single())
        return run

    def _round(self, source: _Source, number: int) -> None:
        """A prompt and its answer, of each place in a slot of its own; who begins changes all the time."""
        prompt = self._case.prompt_tokens
        drawn = [source.round(number, self._stores[where]) for where in PLACES]
        ids = drawn[0][0]
        for slot in ORDERS[number % len(ORDERS)]:
            self._cache.reset(slot)
            self._time(self._run.prefill, slot, source, drawn[slot][1], [], ids[:prompt])
        for at in range(prompt, len(ids)):
            for slot in ORDERS[(number + at) % len(ORDERS)]:
                self._time(self._run.decode, slot, source, drawn[slot][1], ids[:at], [ids[at]])

    def _time(
        self,
        into: dict[tuple[str, str], list[float]],
        slot: int,
        source: _Source,
        lookup: EngramLookup,
        before: list[int],
        ids: list[int],
    ) -> None:
        """Compute tokens of a slot behind those `before`, with its lookup, and note how long that takes."""
        model, cache = self._model, self._cache
        model.engram = lookup
        begun = time.perf_counter()
        if before:
            model.expect([(before, ids[0])])  # as the engine does when it has sampled the token
        model.forward(Batch.of([(slot, len(before), ids)]), cache)
        into.setdefault((PLACES[slot], source.skew), []).append(time.perf_counter() - begun)

    def _single_lookups(self, where: str, rows: torch.Tensor) -> list[float]:
        """Seconds of lookups, each of one token's rows of all tables; rows `[tables, tokens, columns]`."""
        seconds = []
        for at in range(rows.shape[1]):
            begun = time.perf_counter()
            self._look_up(where, rows[:, at])
            seconds.append(time.perf_counter() - begun)
        return seconds

    def _look_up(self, where: str, rows: torch.Tensor) -> None:
        """Wait for rows `[tables, ...]`, of all tables at once."""
        store = self._stores[where]
        tickets = [store.lookup(layer, of.flatten()) for layer, of in zip(self._layers, rows, strict=True)]
        for ticket in tickets:
            ticket.wait()
