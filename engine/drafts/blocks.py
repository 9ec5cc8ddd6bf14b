"""Blocks of drafted tokens through DSpark's stages: V4.1's layers, or V4's, but for what rows see.

All rows of a block see each other, and what was captured of the tokens before it. A slot of the stages' cache
has a ring for that window, and behind it one for a block's own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from engine.cache.grouped import GroupedCache, GroupedShape
from engine.cache.sparse import CacheShape, SparseCache
from engine.families.base import NO_TRACE, Batch
from engine.families.deepseek_v4.eager import V4Eager
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.deepseek_v4.operations import V4Operations, V4Parts
from engine.families.deepseek_v4.recorded import V4Recorded
from engine.families.deepseek_v41.eager import V41Eager
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.deepseek_v41.operations import V41Operations, V41Parts
from engine.families.deepseek_v41.recorded import V41Recorded
from engine.families.places import HOST
from engine.families.streams.forward import StreamModel
from engine.families.streams.operations import MAX_ROWS, StreamOperations
from engine.families.streams.weights import StreamAttention
from engine.layers.operations import Value
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels

Cache = SparseCache | GroupedCache
Noted = V41Recorded | V4Recorded


class BlockSteps(Protocol):
    """How stages of one family are computed."""

    @property
    def cache(self) -> Cache:
        """Of the stages."""
        ...

    def compute(self, batch: Batch, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads of a batch's rows, `[rows, hidden]`, and their logits, operation by operation.

        seen  of each row the places of its slot's rows that it sees besides itself, -1 for none
        """
        ...

    def notes(self, recorder: Recorder) -> Noted:
        """What notes steps with the cache, to be finished by whoever asked."""
        ...

    def noted(self, recorder: Recorder, others: Buffer) -> tuple[Noted, Buffer, Buffer, Buffer]:
        """The same noted, not finished yet: where it begins, what the head reads, and the logits; `others`
        are the places that are seen."""
        ...


def block_steps(layers: StreamModel, slots: int) -> BlockSteps:
    """Those of stages that were read."""
    if isinstance(layers, DeepseekV41):
        return _V41Steps(layers, slots)
    assert isinstance(layers, DeepseekV4)
    return _V4Steps(layers, slots)


def rows_of(cache: Cache, number: int) -> torch.Tensor:
    """A stage's rows, `[slots, window + block, dim]`; they are not rounded."""
    rows = cache.windows[number]
    assert isinstance(rows, torch.Tensor)
    return rows


# ------------------------------------------------------------------------------------------------ V4.1


class _V41Steps:
    def __init__(self, layers: DeepseekV41, slots: int) -> None:
        self._layers, c = layers, layers.config
        stages = c.num_hidden_layers
        shape = CacheShape(
            layers=stages, window=c.sliding_window, head_dim=c.head_dim, index_dim=0, sources={}, history=0,
            history_pad=0, margin=MAX_ROWS, devices=(HOST,) * stages,
        )  # fmt: skip
        self.cache = SparseCache(shape, slots, c.max_position_embeddings)

    def compute(self, batch: Batch, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self._layers.weights.embed[batch.token_ids].float()
        with _V41BlockEager(self._layers.parts, batch, self.cache, seen) as ops:
            return self._head(ops, embedded)

    def notes(self, recorder: Recorder) -> V41Recorded:
        return V41Recorded(self._layers.parts, recorder, self.cache)

    def noted(self, recorder: Recorder, others: Buffer) -> tuple[Noted, Buffer, Buffer, Buffer]:
        ops = _V41BlockNotes(self._layers.parts, recorder, self.cache, others)
        source = ops.begin()
        return ops, source, *self._head(ops, source)

    def _head(self, ops: V41Operations[Value], embedded: Value) -> tuple[Value, Value]:
        states = ops.read_streams(*self._layers._layers(ops, embedded))
        return states, _logits(ops, self._layers, states)


class _V41BlockEager(V41Eager):
    def __init__(self, parts: V41Parts, batch: Batch, cache: SparseCache, seen: torch.Tensor) -> None:
        super().__init__(parts, batch, cache, NO_TRACE, None)
        self._seen = seen

    def attend(self, number: int, attn: StreamAttention, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        rows, window = rows_of(self._cache, number), self._config.sliding_window
        return _attended(self._kernels, self._batch, rows, window, self._seen, attn, q, kv)


class _V41BlockNotes(V41Recorded):
    def __init__(self, parts: V41Parts, recorder: Recorder, cache: SparseCache, others: Buffer) -> None:
        super().__init__(parts, recorder, cache)
        self._others = others

    def attend(self, number: int, attn: StreamAttention, q: Buffer, kv: Buffer) -> Buffer:
        rows, window = rows_of(self._cache, number), self._config.sliding_window
        return _attention_noted(self._recorder, rows, window, self._others, attn, q, kv)


# -------------------------------------------------------------------------------------------------- V4


class _V4Steps:
    def __init__(self, layers: DeepseekV4, slots: int) -> None:
        self._layers, c = layers, layers.config
        shape = GroupedShape(
            window=c.sliding_window, head_dim=c.head_dim, groups=((),) * c.layers, margin=MAX_ROWS,
            devices=(HOST,) * c.layers,
        )  # fmt: skip
        self.cache = GroupedCache(shape, slots, c.max_position_embeddings)

    def compute(self, batch: Batch, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self._layers.weights.embed[batch.token_ids].float()
        with _V4BlockEager(self._layers.parts, batch, self.cache, seen) as ops:
            return self._head(ops, embedded)

    def notes(self, recorder: Recorder) -> V4Recorded:
        return V4Recorded(self._layers.parts, recorder, self.cache)

    def noted(self, recorder: Recorder, others: Buffer) -> tuple[Noted, Buffer, Buffer, Buffer]:
        ops = _V4BlockNotes(self._layers.parts, recorder, self.cache, others)
        source = ops.begin()
        return ops, source, *self._head(ops, source)

    def _head(self, ops: V4Operations[Value], embedded: Value) -> tuple[Value, Value]:
        streams = self._layers._layers(ops, embedded)
        states = ops.read_streams(streams, ops.reading(self._layers.weights.hc_head, streams))
        return states, _logits(ops, self._layers, states)


class _V4BlockEager(V4Eager):
    def __init__(self, parts: V4Parts, batch: Batch, cache: GroupedCache, seen: torch.Tensor) -> None:
        super().__init__(parts, batch, cache, NO_TRACE)
        self._seen = seen

    def attend(self, number: int, attn: StreamAttention, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        rows, window = rows_of(self._cache, number), self._config.sliding_window
        return _attended(self._kernels, self._batch, rows, window, self._seen, attn, q, kv)


class _V4BlockNotes(V4Recorded):
    def __init__(self, parts: V4Parts, recorder: Recorder, cache: GroupedCache, others: Buffer) -> None:
        super().__init__(parts, recorder, cache)
        self._others = others

    def attend(self, number: int, attn: StreamAttention, q: Buffer, kv: Buffer) -> Buffer:
        rows, window = rows_of(self._cache, number), self._config.sliding_window
        return _attention_noted(self._recorder, rows, window, self._others, attn, q, kv)


# ------------------------------------------------------------------------------------- what both share


def _logits(ops: StreamOperations[Value], layers: StreamModel, states: Value) -> Value:
    weights = layers.weights
    (logits,) = ops.linears(ops.norm(states, weights.norm, layers.config.rms_norm_eps), weights.head)
    return logits


def _attended(
    kernels: Kernels,
    batch: Batch,
    rows: torch.Tensor,
    window: int,
    seen: torch.Tensor,
    attn: StreamAttention,
    q: torch.Tensor,
    kv: torch.Tensor,
) -> torch.Tensor:
    """Attention of blocks whose keys are kv, `[rows, heads * dim]` to the same."""
    q, outs, stop = q.view(len(q), len(attn.sink), -1), [], 0
    for segment in batch.segments:
        of = slice(stop, stop := stop + segment.length)
        positions = torch.arange(segment.start, segment.start + segment.length)
        rows[segment.slot, window + positions % MAX_ROWS] = kv[of]
        for row in range(of.start, of.stop):  # each sees itself as its window, and all others as chosen
            one = slice(row, row + 1)
            outs.append(kernels.attend_sparse(q[one], kv[one], attn.sink, 1, rows[segment.slot], seen[one]))
    return torch.cat(outs).flatten(1)


def _attention_noted(
    recorder: Recorder,
    rows: torch.Tensor,
    window: int,
    others: Buffer,
    attn: StreamAttention,
    q: Buffer,
    kv: Buffer,
) -> Buffer:
    own = rows[:, window:]
    recorder.ring(kv, own)
    return recorder.attend_sparse(q, own, attn.sink, 1, rows, others)


class RecordedBlocks:
    """A program that drafts blocks of so many tokens.

    chain  notes what makes of logits and states the tokens and their chances: see `Recorder.chain`
    """

    def __init__(
        self,
        steps: BlockSteps,
        layers: StreamModel,
        recorder: Recorder,
        block: int,
        chain: Callable[[Buffer, Buffer], tuple[Buffer, Buffer]],
    ) -> None:
        self._block, self._embed = block, layers.weights.embed
        others = recorder.input(layers.config.sliding_window + block - 1, torch.int64)
        recorder.keep(others)
        ops, source, states, logits = steps.noted(recorder, others)
        tokens, chances = chain(logits, states)
        recorder.keep(tokens)
        recorder.keep(chances)
        ops.finish(source, logits)
        assert ops.program is not None
        self.program: Program = ops.program
        self._experts = ops._experts
        self._found = [self.program.rows(part).numpy() for part in (tokens, logits, chances)]
        self._places = self.program.rows(others).numpy()

    def run(self, batch: Batch, seen: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a batch's rows, tokens `[blocks, block]`, logits `[blocks, block, vocab]` and chances, valid
        until the next run; seen: see `BlockSteps.compute`, of each block."""
        rows, embed = len(batch.ids), self._embed
        if not isinstance(embed, torch.Tensor):
            self.program.source[:rows] = embed[batch.token_ids].float()
        for n, places in enumerate(seen):
            self._places[n * self._block : (n + 1) * self._block] = places
        with self._experts.running(self.program, rows):
            self.program.run(*batch.places(), batch.ids)
        tokens, logits, chances = (part[:rows].reshape(len(seen), self._block, -1) for part in self._found)
        return tokens[..., 0], logits, chances[..., 0]
