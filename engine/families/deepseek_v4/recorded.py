"""V4's operations noted for a program, and the step that runs it: each row is one sequence's newest token.

Where everything lies in DRAM, a step is one native call. Where experts move, it comes back in layers whose
experts are not all at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.grouped import GroupedCache
from engine.families.base import Batch
from engine.families.deepseek_v4.operations import V4Parts
from engine.families.deepseek_v4.weights import Compressor
from engine.families.replay import replay
from engine.families.streams.notes import StreamNotes
from engine.families.streams.weights import StreamAttention
from engine.layers.hyper_connections import ReadMix
from engine.layers.recorded_experts import RecordedExperts
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.layers import RoutingRule


class V4Recorded(StreamNotes):
    """`V4Operations` noted for host memory, for steps with `cache`."""

    _recorder: Recorder

    def __init__(self, parts: V4Parts, recorder: Recorder, cache: GroupedCache) -> None:
        super().__init__(recorder, parts.frequencies)
        self._config = parts.config
        self._cache = cache
        self._embed = parts.weights.embed
        self._experts = RecordedExperts(recorder, parts.weights.experts, parts.config.swiglu_limit)
        self._by_token: dict[int, Buffer] = {}  # experts, by layer
        self._selected: Buffer | None = None  # in the layer that is being noted
        self.program: Program | None = None
        self.captured: Buffer | None = None

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[n, vocab_size]`."""
        assert self.program is not None
        if not isinstance(self._embed, torch.Tensor):  # its rows are read from disk
            self.program.source[: len(batch.ids)] = self._embed[batch.token_ids].float()
        return self.replay(batch)

    def replay(self, batch: Batch) -> torch.Tensor:
        """The same, of a program whose inputs are filled."""
        assert self.program is not None
        return replay(self.program, self._experts, batch, self._cache)

    def captured_rows(self, rows: int) -> torch.Tensor:
        """What the last run has captured of so many rows; valid until the next one."""
        assert self.program is not None
        assert self.captured is not None
        return self.program.rows(self.captured)[:rows]

    def begin(self) -> Buffer:
        """The embedded tokens, `[rows, hidden]`."""
        if isinstance(self._embed, torch.Tensor):
            return self._recorder.embed(self._embed)
        return self._recorder.input(self._config.hidden_size)

    def finish(self, source: Buffer, result: Buffer) -> None:
        """Make the program, from embedded tokens to logits."""
        self.program = self._recorder.finish(source, result)

    def move(self, device: torch.device, *values: Buffer) -> Sequence[Buffer]:
        return values  # all are in host memory

    def streams(self, x: Buffer, n: int) -> Buffer:
        return self._recorder.repeat(x, n)

    def reading(self, mix: ReadMix, streams: Buffer) -> Buffer:
        return self._recorder.read_mix(streams, mix.fn, mix.scale, mix.base, mix.hc_eps, mix.norm_eps)

    def norm_heads(self, x: Buffer, weight: torch.Tensor, eps: float) -> Buffer:
        return self._recorder.norm(x, weight, eps)

    # -------------------------------------------------------------------------------------- attention

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

    # ---------------------------------------------------------------------------------------- experts

    def by_token(self, number: int, table: torch.Tensor) -> Buffer:
        if number not in self._by_token:
            self._by_token[number] = self._recorder.by_token(table)
        return self._by_token[number]

    def weigh(self, logits: Buffer, ids: Buffer, rule: RoutingRule) -> Buffer:
        return self._recorder.weigh(logits, ids, rule)

    def wants_guesses(self, number: int) -> bool:
        return self._experts.wants_guesses(number)

    def prefetch(self, number: int, ids: Buffer) -> None:
        self._experts.prefetch(number, ids)

    def acquire(self, number: int, ids: Buffer) -> None:
        self._experts.acquire(number, ids)

    def experts(self, number: int, x: Buffer, ids: Buffer, weights: Buffer) -> Buffer:
        return self._experts.run(number, x, ids, weights)
