"""V4.1's operations on streams and attention, noted by a recorder; each row is one sequence's newest
token."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cache.sparse import SparseCache
from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.operations import V41Parts
from engine.families.deepseek_v41.weights import CompressorWeights
from engine.families.streams.notes import StreamNotes
from engine.families.streams.weights import StreamAttention
from engine.layers.hyper_connections import first_mix
from quant.errors import FormatError
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.recording import StepRecorder


class V41Notes(StreamNotes):
    """What is the same on all devices, for steps with `cache`."""

    _config: V41Config

    def __init__(self, parts: V41Parts, recorder: StepRecorder, cache: SparseCache) -> None:
        super().__init__(recorder, parts.frequencies)
        self._parts = parts
        self._config = parts.config
        self._cache = cache
        self._selected: Buffer | None = None  # from the last source layer on
        self._pool: Buffer | None = None

    def narrow(self, number: int, *values: Buffer) -> Sequence[Buffer]:
        """All: each row is a sequence's newest token."""
        return values

    def streams(self, x: Buffer, n: int) -> tuple[Buffer, Buffer]:
        return self._recorder.repeat(x, n), self._recorder.constant(first_mix(1, n)[0])

    def received(self, x: Buffer, n: int) -> tuple[Buffer, Buffer]:
        recorder = self._on_host("received")
        return recorder.part(x, 1, 0, x.width - n), recorder.part(x, 1, x.width - n, n)

    def handed(self, streams: Buffer, pre: Buffer) -> Buffer:
        return self._on_host("handed on").join(streams, pre, 1)

    def _on_host(self, what: str) -> Recorder:
        if not isinstance(self._recorder, Recorder):
            raise FormatError(f"streams are {what} by steps in host memory only")
        return self._recorder

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

    def attend(self, number: int, attn: StreamAttention, q: Buffer, kv: Buffer) -> Buffer:
        window, source = self._cache.windows[number], self._config.kv_source_of(number)
        self._recorder.ring(kv, window)
        entries = None if source is None else self._cache.sources[source].entries
        selected = None if source is None else self._selected
        return self._recorder.attend_sparse(
            q, window, attn.sink, self._config.sliding_window, entries, selected
        )
