"""What Engram tables cost a step: the same decodes and prompts without, from DRAM, and from disk.

The forward is a real one; only the store behind its look-ups changes. Without means zeros that are there
at once. Rows follow from token ids, so their skew is that of the tokens: uniform ones repeat nothing, those
of a Zipf law repeat as words do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from engine.families.deepseek_v41 import DeepseekV41
from engine.layers.engram_lookup import EngramLookup
from engine.loader import load, open_checkpoint
from engine.model import Batch
from memory.budget import MemoryBudget
from memory.engram_store import EngramStore, ReadyRows
from memory.telemetry import Telemetry
from quant.errors import ConfigError

ABSENT, DRAM, NVME = "absent", "dram", "nvme"
KINDS = ("decode", "prefill")
SKEWS = ("uniform", "zipf")
HOT_SHARE = 10  # on disk, the hot cache holds one part in so many of the table
FIRST_TOKEN = 3
WARM_CHUNK = 2048  # tokens of a look-up while the hot cache fills


class _NoTable:
    """A store whose every row is zeros that are there already; at most `most` rows at once."""

    def __init__(self, most: int, dim: int) -> None:
        self._zeros = torch.zeros(most, dim)

    def lookup(self, layer: int, rows: torch.Tensor) -> ReadyRows:
        """Zeros `[n, dim]`."""
        return ReadyRows(self._zeros[: len(rows)])


@dataclass
class EngramRun:
    """Seconds of every round, by (where the table is, skew of its rows); seconds of single look-ups too.

    decode   a token, median of the round's tokens
    prefill  the prompt
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
        """The part by which `decode` or `prefill` is slower than without the table, median over rounds."""
        times = getattr(self, kind)
        pairs = zip(times[where, skew], times[ABSENT, skew], strict=True)
        return float(median(with_table / without - 1 for with_table, without in pairs))

    def worst_penalty(self, where: str) -> float:
        """The largest of a place's penalties."""
        return max(self.penalty(where, skew, kind) for skew in SKEWS for kind in KINDS)


class _Tokens:
    """Endless random token ids of one skew; the same for every store that is compared."""

    def __init__(self, vocab_size: int, skew: str, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        ranks = torch.arange(1, vocab_size - FIRST_TOKEN + 1, dtype=torch.float64)
        self._shares = (ranks if skew == "zipf" else torch.ones_like(ranks)).reciprocal()

    def take(self, count: int) -> list[int]:
        """The next `count` ids."""
        drawn = torch.multinomial(self._shares, count, replacement=True, generator=self._generator)
        ids: list[int] = (drawn + FIRST_TOKEN).tolist()
        return ids


def run_engram(
    path: Path,
    *,
    rounds: int,
    decode_tokens: int,
    prompt_tokens: int,
    warm_tokens: int,
    on_progress: Callable[[int, int], None],
) -> EngramRun:
    """Measure the checkpoint at `path`; its tables, and a tenth of them once more, must fit beside the model.

    Every round decodes and prefills with each store in turn, so that what disturbs one disturbs all.
    Raises ConfigError for a model without tables or without room to hold them, and what loading raises.
    """
    model = load(path, MemoryBudget.of_this_machine()).model
    try:
        if not isinstance(model, DeepseekV41) or not model.config.engram_layer_ids:
            raise ConfigError(f"{path}: this model has no Engram tables")
        whole = model.weights.engram
        table_bytes = sum(files.nbytes for files in whole.files.values())
        if whole.nbytes < table_bytes:
            raise ConfigError(
                f"{path}: tables of {table_bytes / 1e9:.1f} GB do not fit into memory beside the model; "
                "take a slice with fewer rows"
            )
        telemetry = Telemetry()
        on_disk = EngramStore(
            whole.files, open_checkpoint(path), model.kernels, table_bytes // HOT_SHARE, telemetry
        )
        try:
            bench = _Bench(model, {DRAM: whole, NVME: on_disk}, {DRAM: model.telemetry, NVME: telemetry})
            return bench.run(rounds, decode_tokens, prompt_tokens, warm_tokens, on_progress)
        finally:
            on_disk.close()
    finally:
        model.close()


class _Bench:
    def __init__(
        self, model: DeepseekV41, stores: dict[str, EngramStore], telemetry: dict[str, Telemetry]
    ) -> None:
        self._model = model
        self._hashes = model.engram.hashes
        self._layers = model.config.engram_layer_ids
        self._columns = (model.config.engram_max_ngram_size - 1) * model.config.engram_n_heads
        self._stores: dict[str, EngramStore | _NoTable] = dict(stores)
        self._telemetry = telemetry

    def run(
        self,
        rounds: int,
        decode_tokens: int,
        prompt_tokens: int,
        warm_tokens: int,
        on_progress: Callable[[int, int], None],
    ) -> EngramRun:
        vocab, dim = self._model.info.vocab_size, self._model.config.engram_head_dim
        whole, on_disk = self._stores[DRAM], self._stores[NVME]
        assert isinstance(whole, EngramStore)
        assert isinstance(on_disk, EngramStore)
        tables = sum(files.nbytes for files in whole.files.values())
        self._stores[ABSENT] = _NoTable(prompt_tokens * self._columns, dim)
        run = EngramRun(tables, on_disk.nbytes, self._columns * len(self._layers))
        self._cache = self._model.new_cache(1, prompt_tokens + decode_tokens)
        done, total = 0, rounds * len(SKEWS) * len(self._stores)
        for skew in SKEWS:
            self._warm(_Tokens(vocab, skew, 1), warm_tokens)
            before = {where: t.snapshot().rows for where, t in self._telemetry.items()}
            for number in range(rounds):
                # Who begins changes from round to round.
                places = (ABSENT, DRAM, NVME)
                order = places[number % 3 :] + places[: number % 3]
                for where in order:
                    ids = _Tokens(vocab, skew, 1000 + number).take(prompt_tokens + decode_tokens)
                    prefill, decode = self._round(where, ids, prompt_tokens)
                    run.prefill.setdefault((where, skew), []).append(prefill)
                    run.decode.setdefault((where, skew), []).append(decode)
                    done += 1
                    on_progress(done, total)
            for where, telemetry in self._telemetry.items():
                rows = telemetry.snapshot().rows
                asked = rows.get("unique", 0) - before[where].get("unique", 0)
                cached = rows.get("cached", 0) - before[where].get("cached", 0)
                run.hits[where, skew] = cached / max(1, asked)
                run.lookups[where, skew] = self._single_lookups(where, _Tokens(vocab, skew, 9), 300)
        return run

    def _round(self, where: str, ids: list[int], prompt_tokens: int) -> tuple[float, float]:
        """Seconds of the prompt, and of a decoded token (median), with the store `where`."""
        model, cache = self._model, self._cache
        model.engram = EngramLookup(self._layers, self._hashes, self._stores[where])
        cache.reset(0)
        begun = time.perf_counter()
        model.forward(Batch.of([(0, 0, ids[:prompt_tokens])]), cache)
        prefill = time.perf_counter() - begun
        steps = []
        for at in range(prompt_tokens, len(ids)):
            begun = time.perf_counter()
            model.expect(cache, 0, ids[at])  # as the engine does when it has sampled the token
            model.forward(Batch.of([(0, at, [ids[at]])]), cache)
            steps.append(time.perf_counter() - begun)
        return prefill, median(steps)

    def _warm(self, tokens: _Tokens, count: int) -> None:
        """Let the hot cache see what text of this skew asks for."""
        for begin in range(0, count, WARM_CHUNK):
            for rows, layer in self._rows(tokens.take(min(WARM_CHUNK, count - begin))):
                self._stores[NVME].lookup(layer, rows.flatten()).wait()

    def _single_lookups(self, where: str, tokens: _Tokens, count: int) -> list[float]:
        """Seconds of `count` look-ups, each of one token's rows of all tables."""
        by_table = self._rows(tokens.take(count))
        seconds = []
        for at in range(count):
            begun = time.perf_counter()
            tickets = [self._stores[where].lookup(layer, rows[at]) for rows, layer in by_table]
            for ticket in tickets:
                ticket.wait()
            seconds.append(time.perf_counter() - begun)
        return seconds

    def _rows(self, ids: list[int]) -> list[tuple[torch.Tensor, int]]:
        """The rows `[tokens, columns]` that a text asks of each table, and the table's layer."""
        keys = self._model.token_map[torch.tensor(ids)]
        history = torch.full((self._hashes[0].history,), self._cache.shape.history_pad)
        window = torch.cat((history, keys))
        return [(h.rows(window), layer) for h, layer in zip(self._hashes, self._layers, strict=True)]
