"""V4.1's operations noted for a program, and the step that runs it: each row is one sequence's newest token.

Where everything lies in DRAM, a step is one native call. Where experts move, it comes back in layers whose
experts are not all at hand. For Engram rows it comes back only if they are late, or used for a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.sparse import SparseCache
from engine.families.base import Batch
from engine.families.deepseek_v41.guesses import Guesses
from engine.families.deepseek_v41.operations import StreamMix, V41Parts
from engine.families.deepseek_v41.weights import AttentionWeights, CompressorWeights
from engine.layers.engram_lookup import StepRows
from engine.layers.hyper_connections import HyperConnection, first_mix
from engine.layers.operations import RecordedBasics
from engine.layers.recorded_experts import RecordedExperts
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder, Selector
from quant.kernels.interface import Weight

MAX_ROWS = 16  # of a recorded step; larger ones are computed operation by operation


class V41Recorded(RecordedBasics):
    """`V41Operations` noted by a recorder, for steps with `cache`."""

    def __init__(self, parts: V41Parts, recorder: Recorder, cache: SparseCache) -> None:
        super().__init__(recorder)
        self._parts = parts
        self._config = parts.config
        self._cache = cache
        self._turns: dict[tuple[bool, bool, int], Buffer] = {}  # by compressed, backwards, unit
        self._selected: Buffer | None = None  # from the last source layer on
        self._pool: Buffer | None = None
        self._experts = RecordedExperts(recorder, parts.weights.experts, parts.config.swiglu_limit)
        self.late: dict[int, torch.Tensor] = {}  # by Engram table: see `Recorder.hand_over`
        self.rows: dict[int, Buffer] = {}
        self.program: Program | None = None
        self._guesses: Guesses | None = None
        self._step_rows: StepRows | None = None

    def run(self, batch: Batch, embedded: torch.Tensor, rows: StepRows | None) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[n, vocab_size]`; the batch's tokens embedded, `[rows, hidden]`."""
        assert self.program is not None
        self._guesses = Guesses(self._parts, rows)
        self._step_rows = rows
        self.program.source[: len(embedded)] = embedded
        for table, skip in self.late.items():
            assert rows is not None
            skip[0] = int(rows.is_there(table))
            if skip[0]:
                self._fill(table, len(embedded))
        self._experts.begin(self.program)
        try:
            self.program.run([s.slot for s in batch.segments], [s.start for s in batch.segments])
        except BaseException:
            self._experts.fail()
            raise
        self._experts.end(len(embedded))
        return self.program.logits(batch.logit_rows)

    def finish(self, source: Buffer, result: Buffer) -> None:
        """Make the program, from embedded tokens to logits."""
        self.program = self._recorder.finish(source, result)

    def at_layer(self, number: int | None) -> None:
        self._recorder.layer = number

    def move(self, device: torch.device, *values: Buffer) -> Sequence[Buffer]:
        return values  # all are in host memory

    def trace(self, name: str, value: Buffer, *shape: int) -> None:
        """Nothing is kept: a step that is traced is not replayed."""

    # ---------------------------------------------------------------------------------------- streams

    def streams(self, x: Buffer, n: int) -> tuple[Buffer, Buffer]:
        return self._recorder.repeat(x, n), self._recorder.constant(first_mix(1, n)[0])

    def mix(self, connection: HyperConnection, streams: Buffer) -> StreamMix[Buffer]:
        c = connection
        (m,) = self.linears(self.norm(streams, None, c.norm_eps), c.fn)
        n = self._config.hc_mult
        return StreamMix(*self._recorder.mix(m, c.scale, c.base, n, c.sinkhorn_iters, c.hc_eps))

    def read_streams(self, streams: Buffer, pre: Buffer) -> Buffer:
        return self._recorder.weighted_sum(streams, pre)

    def write_streams(self, streams: Buffer, y: Buffer, mix: StreamMix[Buffer]) -> Buffer:
        return self._recorder.mix_streams(streams, y, mix.post, mix.combine)

    def engram(self, number: int, streams: Buffer) -> Buffer:
        layer, table = self._parts.weights.layers[number], self._parts.table(number)
        assert layer.engram is not None
        wkv = layer.engram.wkv
        if not self._experts.is_still:  # a prediction may have made them already
            kv = self._recorder.buffer(int(wkv.shape[0]))
            self._recorder.hand_over(lambda rows: self._fill_kv(number, kv, rows), [], [kv])
        else:
            self.rows[table] = self._recorder.input(int(wkv.shape[1]))
            self.late[table] = self._recorder.hand_over(
                lambda rows: self._fill(table, rows), [], [self.rows[table]]
            )
            (kv,) = self.linears(self.rows[table], wkv)
        return self._recorder.engram(streams, kv, layer.engram.qk, layer.engram.norm_eps)

    def _fill(self, table: int, rows: int) -> None:
        assert self.program is not None
        assert self._step_rows is not None
        self.program.rows(self.rows[table])[:rows] = self._step_rows.wait(table)

    def _fill_kv(self, number: int, kv: Buffer, rows: int) -> None:
        assert self.program is not None
        assert self._guesses is not None
        self.program.rows(kv)[:rows] = self._guesses.wait_for_kv(number)

    # -------------------------------------------------------------------------------------- attention

    def rotate(self, x: Buffer, heads: int, *, compressed: bool, backwards: bool = False) -> Buffer:
        return self._recorder.rotate(x, self._turn(compressed, backwards), heads)

    def blocks(self, x: Buffer, weights: Sequence[Weight]) -> Buffer:
        return self._recorder.blocks(x, weights)

    def compress(self, number: int, compressor: CompressorWeights, x: Buffer) -> None:
        recorder, eps, state = self._recorder, self._config.rms_norm_eps, self._cache.sources[number]
        ratio = state.ratio
        if compressor.wgate is None:
            (latent,) = self.linears(x, compressor.wkv)
        else:
            kv, gate = self.linears(x, compressor.wkv, compressor.wgate)
            recorder.ring(kv, state.open_kv)
            recorder.ring(gate, state.open_gate)
        turns = self._turn(True, False, ratio)
        with recorder.if_complete(ratio):
            if ratio > 1:
                latent = recorder.pool(state.open_kv, state.open_gate, ratio)
            latent = self.norm(latent, compressor.norm, eps)
            (key,) = self.linears(latent, compressor.index_wk)
            key = self.norm(key, compressor.index_norm, eps)
            recorder.entry(recorder.rotate(latent, turns, 1), state.entries, ratio)
            recorder.entry(recorder.rotate(key, turns, 1), state.index_keys, ratio)

    def select(self, number: int, queries: Buffer, weights: Buffer) -> None:
        c = self._config
        source = c.kv_source_of(number)
        assert source is not None
        state = self._cache.sources[source]
        self._selected, pool = self._recorder.select(
            queries,
            weights,
            state.index_keys,
            state.ratio,
            Selector(c.index_topk, c.candidate_block_size, c.candidate_topk_blocks),
            self._pool,
            makes_pool=number == c.candidate_source_layer_id,
        )
        self._pool = pool or self._pool

    def attend(self, number: int, attn: AttentionWeights, q: Buffer, kv: Buffer) -> Buffer:
        window, source = self._cache.windows[number], self._config.kv_source_of(number)
        self._recorder.ring(kv, window)
        entries = None if source is None else self._cache.sources[source].entries
        selected = None if source is None else self._selected
        return self._recorder.attend_sparse(
            q, window, attn.sink, self._config.sliding_window, entries, selected
        )

    def _turn(self, compressed: bool, backwards: bool, unit: int = 1) -> Buffer:
        """Rotations of the rows' positions, or of their groups' first ones; computed once a step."""
        key = compressed, backwards, unit
        if key not in self._turns:
            parts = self._parts
            by = parts.compressed_frequencies if compressed else parts.plain_frequencies
            self._turns[key] = self._recorder.turns(by, unit=unit, backwards=backwards)
        return self._turns[key]

    # ---------------------------------------------------------------------------------------- experts

    def prefetch(
        self, number: int, streams: Buffer, pre: Buffer, y: Buffer | None, mix: StreamMix[Buffer] | None
    ) -> None:
        if self._experts.is_still:
            return
        layer = self._parts.weights.layers[number]
        if y is not None and mix is not None:
            if layer.engram is not None:
                return self._prefetch_behind_engram(number, streams, pre, y, mix)
            streams = self.write_streams(streams, y, mix)
        c = self._config
        (logits,) = self.linears(
            self.norm(self.read_streams(streams, pre), layer.ffn_norm, c.rms_norm_eps), layer.gate
        )
        ids, _ = self.route(logits, layer.gate_bias, c.num_experts_per_tok, c.routed_scaling_factor)
        self._experts.prefetch(number, ids)

    def _prefetch_behind_engram(
        self, number: int, streams: Buffer, pre: Buffer, y: Buffer, mix: StreamMix[Buffer]
    ) -> None:
        """Predict a layer that adds table rows first: these may be there, or not."""

        def work(rows: int) -> None:
            assert self._guesses is not None
            at = self._tensors(rows)
            found = StreamMix(at(mix.pre), at(mix.post), at(mix.combine))
            self._guesses.prefetch(number, at(streams), at(pre), at(y), found)

        self._recorder.hand_over(work, [streams, pre, y, mix.pre, mix.post, mix.combine], [])

    def acquire(self, number: int, ids: Buffer) -> None:
        self._experts.acquire(number, ids)

    def experts(self, number: int, x: Buffer, ids: Buffer, weights: Buffer) -> Buffer:
        return self._experts.run(number, x, ids, weights)

    def _tensors(self, rows: int) -> _Rows:
        assert self.program is not None
        return _Rows(self.program, rows)


class _Rows:
    """Buffers of a program's step as tensors: the rows that are alive."""

    def __init__(self, program: Program, rows: int) -> None:
        self._program = program
        self._rows = rows

    def __call__(self, buffer: Buffer) -> torch.Tensor:
        return self._program.rows(buffer)[: self._rows]
