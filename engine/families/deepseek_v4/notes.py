"""V4's operations on streams and attention, noted by a recorder; each row is one sequence's newest token."""

from __future__ import annotations

import torch

from engine.cache.grouped import GroupedCache
from engine.families.deepseek_v4.config import V4Config
from engine.families.deepseek_v4.operations import V4Parts
from engine.families.deepseek_v4.weights import Compressor
from engine.families.streams.notes import StreamNotes
from engine.families.streams.weights import StreamAttention
from engine.layers.hyper_connections import ReadMix
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer
from quant.kernels.recording import StepRecorder


class V4Notes(StreamNotes):
    """What is the same on all devices, for steps with `cache`."""

    _config: V4Config

    def __init__(self, parts: V4Parts, recorder: StepRecorder, cache: GroupedCache) -> None:
        super().__init__(recorder, parts.frequencies)
        self._config = parts.config
        self._cache = cache
        self._embed = parts.weights.embed
        self._selected: Buffer | None = None  # in the layer that is being noted

    def streams(self, x: Buffer, n: int) -> Buffer:
        return self._recorder.repeat(x, n)

    def reading(self, mix: ReadMix, streams: Buffer) -> Buffer:
        return self._recorder.read_mix(streams, mix.fn, mix.scale, mix.base, mix.hc_eps, mix.norm_eps)

    def norm_heads(self, x: Buffer, weight: torch.Tensor, eps: float) -> Buffer:
        return self._recorder.norm(x, weight, eps)

    def compress(self, number: int, kind: int, compressor: Compressor, x: Buffer) -> None:
        recorder, state = self._recorder, self._cache.states[number][kind]
        ratio = state.groups.ratio
        kv, gate = self.linears(x, compressor.wkv, compressor.wgate)
        recorder.ring(kv, state.open_kv)
        recorder.ring(recorder.bias(gate, compressor.ape), state.open_gate)
        turns = self._turn(True, False, ratio)
        with recorder.if_complete(ratio):
            latent = recorder.pool(state.open_kv, state.open_gate, ratio, overlaps=state.groups.overlaps)
            latent = self.norm(latent, compressor.norm, self._config.rms_norm_eps)
            recorder.entry(recorder.rotate(latent, turns, 1), state.entries, ratio)

    def select(self, number: int, queries: Buffer, weights: Buffer) -> None:
        keys, selector = self._cache.states[number][1], Selector(self._config.index_topk, 0, 0)
        self._selected, _ = self._recorder.select(
            queries, weights, keys.entries, keys.groups.ratio, selector, None, makes_pool=False
        )

    def attend(self, number: int, attn: StreamAttention, q: Buffer, kv: Buffer) -> Buffer:
        window, states = self._cache.windows[number], self._cache.states[number]
        self._recorder.ring(kv, window)
        is_indexed = len(states) > 1
        entries = states[0].entries if states else None
        chosen = self._selected if is_indexed else None
        every = states[0].groups.ratio if states and not is_indexed else None
        size = self._config.sliding_window
        return self._recorder.attend_sparse(q, window, attn.sink, size, entries, chosen, every)
