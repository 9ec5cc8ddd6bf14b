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
from engine.families.deepseek_v41.notes import V41Notes
from engine.families.deepseek_v41.operations import V41Parts
from engine.families.replay import replay
from engine.families.streams.operations import StreamMix, Written
from engine.layers.engram_lookup import StepRows
from engine.layers.recorded_experts import RecordedExperts
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder


class V41Recorded(V41Notes):
    """`V41Operations` noted for host memory, for steps with `cache`."""

    _recorder: Recorder

    def __init__(self, parts: V41Parts, recorder: Recorder, cache: SparseCache) -> None:
        super().__init__(parts, recorder, cache)
        self._experts = RecordedExperts(recorder, parts.weights.experts, parts.config.swiglu_limit)
        # Whether a step needs nothing but token ids: their embedding and table rows are found natively.
        self.takes_tokens = parts.ngrams is not None or (
            isinstance(parts.weights.embed, torch.Tensor) and not parts.config.engram_layer_ids
        )
        self._addresses: Buffer | None = None  # of table rows
        self.late: dict[int, torch.Tensor] = {}  # by Engram table: see `Recorder.hand_over`
        self.rows: dict[int, Buffer] = {}
        self.program: Program | None = None
        self._guesses: Guesses | None = None
        self._step_rows: StepRows | None = None

    def run_tokens(self, batch: Batch) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[n, vocab_size]`."""
        assert self.program is not None
        if batch.states is not None:
            self.program.source[: len(batch.ids)] = batch.states
        return replay(self.program, self._experts, batch, self._cache)

    def run(self, batch: Batch, embedded: torch.Tensor, rows: StepRows | None) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[n, vocab_size]`; the batch's tokens embedded, `[rows, hidden]`."""
        assert self.program is not None
        self._guesses = Guesses(self._parts, rows, torch.arange(len(batch.ids)))
        self._step_rows = rows
        self.program.source[: len(embedded)] = embedded
        for table, skip in self.late.items():
            assert rows is not None
            skip[0] = int(rows.is_there(table))
            if skip[0]:
                self._fill(table, len(embedded))
        return replay(self.program, self._experts, batch, self._cache)

    def begin(self) -> Buffer:
        """The embedded tokens, `[rows, hidden]`, or what another part hands on."""
        embed, ngrams = self._parts.weights.embed, self._parts.ngrams
        if self.takes_tokens and ngrams is not None:
            self._addresses = self._recorder.ngrams(ngrams, self._cache.history)
        if not self._config.is_first:
            return self._recorder.input(self._config.state_width)
        if not self.takes_tokens or not isinstance(embed, torch.Tensor):
            return self._recorder.input(self._config.hidden_size)
        return self._recorder.embed(embed)

    def finish(self, source: Buffer, result: Buffer) -> None:
        """Make the program, from embedded tokens to logits."""
        self.program = self._recorder.finish(source, result)

    def captured_rows(self, rows: int) -> torch.Tensor:
        """What the last run has captured of so many rows; valid until the next one."""
        assert self.program is not None
        return self._captured_rows(self.program, rows)

    def move(self, device: torch.device, *values: Buffer) -> Sequence[Buffer]:
        return values  # all are in host memory

    def engram(self, number: int, streams: Buffer) -> Buffer:
        layer, table = self._parts.weights.layers[number], self._parts.table(number)
        assert layer.engram is not None
        wkv, ngrams = layer.engram.wkv, self._parts.ngrams
        if ngrams is not None and self._addresses is not None:
            counts = self._parts.weights.engram.native_counts
            rows = self._recorder.table_rows(ngrams, table, self._addresses, counts)
            (kv,) = self.linears(rows, wkv)
        elif self._experts.wants_guesses(number):  # a prediction may have made them already
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

    # ---------------------------------------------------------------------------------------- experts

    def prefetch(self, number: int, streams: Buffer, pre: Buffer, written: Written[Buffer]) -> None:
        if not self._experts.wants_guesses(number):
            return
        layer = self._parts.weights.layers[number]
        if written is not None:
            y, mix = written
            if layer.engram is not None:
                return self._prefetch_behind_engram(number, streams, pre, y, mix)
            streams = self.write_streams(streams, y, mix)
        x = self.norm(self.read_streams(streams, pre), layer.ffn_norm, self._config.rms_norm_eps)
        (logits,) = self.linears(x, layer.gate)
        ids, _ = self.route(logits, layer.gate_bias, self._config.routing)
        self._experts.prefetch(number, ids)

    def _prefetch_behind_engram(
        self, number: int, streams: Buffer, pre: Buffer, y: Buffer, mix: StreamMix[Buffer]
    ) -> None:
        """Predict a layer that adds table rows first: these may be there, or not."""

        def work(rows: int) -> None:
            assert self._guesses is not None
            at = self._tensors(rows)
            found = StreamMix(at(mix.pre), at(mix.post), at(mix.combine))
            self._guesses.prefetch(number, at(streams), at(pre), (at(y), found))

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
