"""V4.1's operations on tensors, computed at once, for the tokens of some segments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from engine.cache.sparse import SparseCache
from engine.families.base import Batch, Segment, Trace
from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.guesses import Guesses
from engine.families.deepseek_v41.operations import V41Parts
from engine.families.deepseek_v41.weights import CompressorWeights
from engine.families.streams.eager import BLOCK, EagerStreams, pieces_of
from engine.families.streams.operations import Written
from engine.families.streams.weights import StreamAttention
from engine.layers.engram_lookup import StepRows
from engine.layers.hyper_connections import first_mix
from engine.layers.routed_experts import EagerExperts
from engine.layers.sparse_attention import CandidatePool, Selection, choose_entries
from quant.formats.rows import Rows, bytes_of, row_format_of


class V41Eager(EagerStreams):
    """`V41Operations` for a batch. A context: experts that it has acquired are released at the end.

    rows  of Engram tables, that were asked for
    """

    def __init__(
        self, parts: V41Parts, batch: Batch, cache: SparseCache, trace: Trace, rows: StepRows | None
    ) -> None:
        c = parts.config
        self._tokens = _tokens_by_layer(c, batch, cache.margin)
        experts = EagerExperts(parts.weights.experts, c.swiglu_limit, self._tokens, c.num_experts_per_tok)
        super().__init__(parts.kernels, batch, trace, parts.frequencies, parts.config.hc_mult, experts)
        self._parts = parts
        self._config = parts.config
        self._cache = cache
        self._guesses = Guesses(parts, rows, torch.arange(len(batch.ids)))
        self._ends = _ends_of(batch)  # of each piece's prompt, as far as its tokens depend on one another
        self._captured: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens, and what was kept of them
        self._selections: dict[int, Selection] = {}  # of each piece, from the last source layer on
        self._pools: dict[int, CandidatePool] = {}

    # ---------------------------------------------------------------------------------------- streams

    def streams(self, x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x.repeat(1, n), first_mix(len(x), n)

    def received(self, x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :-n].contiguous(), x[:, -n:].contiguous()

    def handed(self, streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
        return torch.cat([streams, pre], dim=1)

    def narrow(self, number: int, *values: torch.Tensor) -> Sequence[torch.Tensor] | None:
        if self._ends is None:
            return values
        needed = self._config.tail_of(number) + self._cache.margin
        lengths = [_computed(s, end, needed) for (s, _), end in zip(self._pieces, self._ends, strict=True)]
        if not any(lengths):
            return None
        if lengths == [s.length for s, _ in self._pieces]:
            return values
        rows = torch.cat(
            [torch.arange(at.stop - n, at.stop) for (_, at), n in zip(self._pieces, lengths, strict=True)]
        )
        left = [i for i, n in enumerate(lengths) if n]
        pieces = [self._pieces[i][0].last(lengths[i]) for i in left]
        self._guesses.kept, self._ends = self._guesses.kept[rows], [self._ends[i] for i in left]
        if self._selections:
            self._selections = {n: self._selections[i].last(lengths[i]) for n, i in enumerate(left)}
        if self._pools:
            self._pools = {n: self._pools[i].last(lengths[i]) for n, i in enumerate(left)}
        self._work_on(pieces)
        return [value[rows.to(value.device)] for value in values]

    def rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where values have the rows of these of the batch's tokens, which must be there."""
        return torch.searchsorted(self._guesses.kept, tokens)

    def capture(self, streams: torch.Tensor) -> None:
        parallel = self._parallel(streams)
        share = streams.new_full(parallel.shape[:2], 1 / parallel.shape[1])
        self._captured.append((self._guesses.kept, self._kernels.weighted_sum(parallel, share)))

    def captured(self, layers: int) -> list[torch.Tensor]:
        """Of each segment, what was captured of its last tokens, `[n, layers * hidden]`: of those that all of
        so many layers have computed."""
        if len(self._captured) < layers:  # amid a prompt
            return [torch.empty(0, layers * self._config.hidden_size)] * len(self._batch.segments)
        last = self._captured[-1][0]
        found = torch.cat([mean[torch.searchsorted(kept, last)] for kept, mean in self._captured], dim=1)
        ends = list(accumulate(segment.length for segment in self._batch.segments))
        counts = torch.bincount(torch.searchsorted(torch.tensor(ends), last, right=True), minlength=len(ends))
        return list(torch.split(found, counts.tolist()))

    def engram(self, number: int, streams: torch.Tensor) -> torch.Tensor:
        layer = self._parts.weights.layers[number]
        assert layer.engram is not None
        out = torch.empty_like(streams)
        for start in range(0, len(streams), BLOCK):
            rows = slice(start, start + BLOCK)
            kv = self._guesses.wait_for_kv(number, rows)
            self._trace.add(f"engram_kv.{number}", kv)
            parallel = self._parallel(streams[rows])
            gates, value = layer.engram.gates_and_value(self._kernels, parallel, kv)
            self._trace.add(f"engram_gate.{number}", gates)
            torch.add(parallel, gates.unsqueeze(-1) * value.unsqueeze(1), out=self._parallel(out[rows]))
        return out

    # -------------------------------------------------------------------------------------- attention

    def compress(self, number: int, compressor: CompressorWeights, x: torch.Tensor) -> None:
        config = self._config
        state = self._cache.sources[number]
        ratio = state.ratio
        kv = self._kernels.linear(x, compressor.wkv)  # [tokens, head_dim]
        gate = kv if compressor.wgate is None else self._kernels.linear(x, compressor.wgate)
        for _, segment, at in self._pieces_here():
            first = segment.start // ratio
            count = (segment.start + segment.length) // ratio - first
            latent, gates = self._cache.extend_group(number, segment, kv[at], gate[at])
            if count == 0:
                continue
            if ratio > 1:
                grouped = (count, ratio, config.head_dim)
                latent, gates = latent[: count * ratio], gates[: count * ratio]
                latent = self._kernels.pool_groups(latent.view(grouped), gates.view(grouped))
            latent = self._kernels.rms_norm(latent, compressor.norm, config.rms_norm_eps)
            rotation = self._group_rotation(first, count, ratio, x.device)
            index_key = self._kernels.linear(latent, compressor.index_wk)
            index_key = self._kernels.rms_norm(index_key, compressor.index_norm, config.rms_norm_eps)
            for rows, made in ((state.entries, latent), (state.index_keys, index_key)):
                new = self._kernels.encode_rows(rotation.apply(self._kernels, made), row_format_of(rows))
                bytes_of(rows)[segment.slot, first : first + count] = bytes_of(new)

    def select(self, number: int, queries: torch.Tensor, weights: torch.Tensor) -> None:
        config = self._config
        source = config.kv_source_of(number)
        assert source is not None
        state = self._cache.sources[source]
        device = state.index_keys.device  # queries go where the keys are, which are many more
        queries = queries.view(len(queries), config.index_n_heads, -1).to(device)
        weights = weights.to(device)
        makes_pool = number == config.candidate_source_layer_id
        blocks = (config.candidate_block_size, config.candidate_topk_blocks) if makes_pool else None
        for i, segment, at in self._pieces_here():
            end = segment.start + segment.length
            seen = torch.arange(segment.start + 1, end + 1, device=device) // state.ratio  # [L]
            keys = state.index_keys[segment.slot, : end // state.ratio]
            pool = self._pools[i].to(device) if i in self._pools else None
            selection, made = choose_entries(
                self._kernels, queries[at], weights[at], keys, seen, config.index_topk, pool, blocks
            )
            self._selections[i] = selection
            self._trace.add(f"index_selected.{number}", selection.entries)
            if made is not None:
                self._pools[i] = made

    def attend(self, number: int, attn: StreamAttention, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        source = self._config.kv_source_of(number)
        latents = self._kernels.encode_rows(kv, row_format_of(self._cache.windows[number]))

        def seen(i: int, segment: Segment, at: slice) -> tuple[Rows, Rows | None, torch.Tensor | None]:
            window_kv = self._cache.extend_window(number, segment, latents[at])
            if source is None:
                return window_kv, None, None
            return window_kv, self._cache.sources[source].entries[segment.slot], self._selections[i].entries

        return self._attend(q, attn.sink, self._config.sliding_window, seen)

    # ---------------------------------------------------------------------------------------- experts

    def prefetch(
        self,
        number: int,
        streams: torch.Tensor,
        pre: torch.Tensor,
        written: Written[torch.Tensor],
    ) -> None:
        if self._tokens[number]:  # amid a prompt, late layers reach no experts
            self._guesses.prefetch(number, streams, pre, written)


def _tokens_by_layer(config: V41Config, batch: Batch, margin: int) -> list[int]:
    """How many of a batch's tokens each layer computes: see `V41Eager.narrow`."""
    ends = _ends_of(batch)
    if ends is None:
        return [len(batch.ids)] * config.num_hidden_layers
    pieces = [piece for segment in batch.segments for piece in pieces_of(segment)]
    counts = []
    for layer in range(config.num_hidden_layers):
        if layer < config.first_tail_layer - 1 or not config.has_tail:
            counts.append(len(batch.ids))
        else:
            needed = config.tail_of(layer) + margin
            counts.append(sum(_computed(s, end, needed) for s, end in zip(pieces, ends, strict=True)))
    return counts


def _computed(piece: Segment, end: int, needed: int) -> int:
    """How many of a piece's tokens are among the last `needed` before `end`."""
    return min(piece.length, max(0, piece.start + piece.length + needed - end))


def _ends_of(batch: Batch) -> list[int] | None:
    """Where what is computed of each piece's sequence ends, as far as its results are wanted; None where
    all are. A segment all of whose tokens are wanted counts as ending where it begins."""
    if batch.to_come is None:
        return None
    ends = []
    for segment, to_come in zip(batch.segments, batch.to_come, strict=True):
        end = segment.start + segment.length
        ends += [segment.start if to_come is None else end + to_come] * len(pieces_of(segment))
    return ends
