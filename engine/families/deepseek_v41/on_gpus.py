"""V4.1's operations noted for several devices: one program for each stay on a device, run one after the
other.

A step goes from device to device as layers do, and takes along what later layers need. Compressed entries
stay with the layer that made them: where another device asks for some, queries travel to their index keys,
and the chosen entries come back to a copy of their own, once for all layers that share the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.sparse import SparseCache
from engine.families.base import Batch
from engine.families.deepseek_v41.notes import V41Notes
from engine.families.deepseek_v41.operations import V41Parts
from engine.families.on_gpus.stays import Stay
from engine.families.on_gpus.step import OnGpus, RecorderOn, StepExperts, StepOnGpus
from engine.families.streams.operations import Written
from engine.families.streams.weights import StreamAttention
from engine.layers.engram_lookup import StepRows
from memory.experts.coordinator import Coordinator
from quant.formats.rows import Rows, bytes_of, like
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer
from quant.kernels.layers import RoutingRule


class V41OnGpus(OnGpus, V41Notes):
    """`V41Operations` noted by a recorder for each device, for steps with `cache`."""

    def __init__(
        self,
        parts: V41Parts,
        recorder_on: RecorderOn,
        cache: SparseCache,
        first: torch.device,
        coordinator: Coordinator,
    ) -> None:
        c = parts.config
        experts = StepExperts(
            parts.weights.experts, coordinator, c.swiglu_limit, c.num_hidden_layers, c.n_routed_experts
        )
        self.step = StepOnGpus(recorder_on, first, experts)
        super().__init__(parts, self.step.recorder, cache)
        self._layer: int | None = None
        self._copies: dict[tuple[int, torch.device], torch.Tensor] = {}  # of chosen entries, by source
        self._copied: Buffer | None = None  # which of them are chosen
        self._step_rows: StepRows | None = None
        self._kv: dict[int, Buffer] = {}  # of table rows, by layer

    def run(self, batch: Batch, embedded: torch.Tensor, rows: StepRows | None) -> torch.Tensor:
        self._step_rows = rows
        return self.step.run(embedded, *batch.places())[batch.logit_rows]

    def nbytes(self, result: Buffer) -> dict[torch.device, int]:
        """Bytes that the programs would hold, by device."""
        found = super().nbytes(result)
        for (_, device), copy in self._copies.items():
            found[device] += copy.nbytes
        return found

    # --------------------------------------------------------------------------------- between devices

    def at_layer(self, number: int | None) -> None:
        self._layer = number
        super().at_layer(number)

    def move(self, device: torch.device, *values: Buffer) -> Sequence[Buffer]:
        if device == self._recorder.device:
            return values
        chosen = [value for value in (self._selected, self._pool) if value is not None]
        moved = self.step.go_to(device, [*values, *chosen])
        self._recorder = self.step.recorder
        if self._pool is not None:
            self._pool = moved.pop()
        if self._selected is not None:
            self._selected = moved.pop()
        self._copied = None
        self._turns = {}
        self._kv = {}
        return moved

    def select(self, number: int, queries: Buffer, weights: Buffer) -> None:
        source = self._config.kv_source_of(number)
        assert source is not None
        self._copied = None
        keys = self._cache.sources[source].index_keys
        if keys.device == self._recorder.device:
            super().select(number, queries, weights)
            return
        c, step, here = self._config, self.step, self.step.stay
        there = Stay(step.recorder_on(keys.device))
        there.recorder.layer = number
        given = [queries, weights, *([] if self._pool is None else [self._pool])]
        asked = [there.recorder.input(value.width, value.dtype) for value in given]
        chosen, pool = there.recorder.select(
            asked[0],
            asked[1],
            keys,
            self._cache.sources[source].ratio,
            Selector(c.index_topk, c.candidate_block_size, c.candidate_topk_blocks),
            asked[2] if self._pool is not None else None,
            makes_pool=number == c.candidate_source_layer_id,
        )
        there.program = there.recorder.finish(asked[0], chosen)
        found = [chosen, *([] if pool is None else [pool])]
        outs = [self._recorder.buffer(value.width, value.dtype) for value in found]

        def work(rows: int) -> None:
            assert there.program is not None
            for value, to in zip(given, asked, strict=True):
                there.rows(to, rows).copy_(here.rows(value, rows))
            there.program.run(step.slots, step.positions)
            for value, to in zip(found, outs, strict=True):
                here.rows(to, rows).copy_(there.rows(value, rows))

        self.step.between.append(work)
        self._recorder.hand_over(work, given, outs)
        self._selected, *pools = outs
        self._pool = pools[0] if pools else self._pool

    def attend(self, number: int, attn: StreamAttention, q: Buffer, kv: Buffer) -> Buffer:
        source = self._config.kv_source_of(number)
        if source is None or self._cache.sources[source].entries.device == self._recorder.device:
            return super().attend(number, attn, q, kv)
        entries, chosen = self._entries_from(source)
        window = self._cache.windows[number]
        self._recorder.ring(kv, window)
        return self._recorder.attend_sparse(
            q, window, attn.sink, self._config.sliding_window, entries, chosen
        )

    def _entries_from(self, source: int) -> tuple[Rows, Buffer]:
        """The chosen entries of another device, copied to this one: `[slots, k, dim]`, and which of them."""
        step, here, selected, held = (
            self.step,
            self.step.stay,
            self._selected,
            self._cache.sources[source].entries,
        )
        entries = bytes_of(held)
        assert selected is not None
        key = source, self._recorder.device
        if key not in self._copies:
            shape = len(entries), selected.width, entries.shape[2]
            self._copies[key] = torch.zeros(shape, dtype=entries.dtype, device=self._recorder.device)
        copy = self._copies[key]
        if self._copied is not None:
            return like(held, copy), self._copied
        copied = self._recorder.buffer(selected.width, torch.int64)

        def work(rows: int) -> None:
            slots = torch.tensor(step.slots)
            chosen = here.rows(selected, rows).to(entries.device)
            found = entries[slots.to(entries.device).unsqueeze(1), chosen.clamp(min=0)]  # [rows, k, dim]
            copy[slots.to(copy.device)] = found.to(copy.device)
            numbers = torch.arange(selected.width, device=copy.device).expand(rows, -1)
            here.rows(copied, rows).copy_(torch.where(chosen.to(copy.device) < 0, -1, numbers))

        self.step.between.append(work)
        self._recorder.hand_over(work, [selected], [copied])
        self._copied = copied
        return like(held, copy), copied

    # ---------------------------------------------------------------------------- Engram and experts

    def _look_ahead(self, number: int) -> None:
        """Multiply the table rows of the next layer beside what this one multiplies, if it is on this
        device."""
        layers = self._parts.weights.layers
        if number >= len(layers) or layers[number].device != self._recorder.device or number in self._kv:
            return
        if layers[number].engram is not None:
            self._kv[number] = self._engram_kv(number)

    def engram(self, number: int, streams: Buffer) -> Buffer:
        layer = self._parts.weights.layers[number]
        assert layer.engram is not None
        kv = self._kv[number] if number in self._kv else self._engram_kv(number)
        return self._recorder.engram(streams, kv, layer.engram.qk, layer.engram.norm_eps)

    def _engram_kv(self, number: int) -> Buffer:
        """Keys and value of the tokens' table rows, once these are there."""
        layer, here = self._parts.weights.layers[number], self.step.stay
        assert layer.engram is not None
        rows_of = self._recorder.buffer(int(layer.engram.wkv.shape[1]))

        def work(rows: int) -> None:
            assert self._step_rows is not None
            here.rows(rows_of, rows).copy_(self._step_rows.wait(self._parts.table(number)))

        self._recorder.hand_over(work, [], [rows_of])
        (kv,) = self.linears(rows_of, layer.engram.wkv)
        return kv

    def prefetch(self, number: int, streams: Buffer, pre: Buffer, written: Written[Buffer]) -> None:
        layer, store = self._parts.weights.layers[number], self._parts.weights.experts
        if written is None or store.slots.keeps_copies:
            return
        if layer.device != self._recorder.device:
            return  # its router is on another one
        c = self._config
        x = self.read_streams(self.write_streams(streams, *written), pre)
        x = self.norm(x, layer.ffn_norm, c.rms_norm_eps)
        (logits,) = self.linears(x, layer.gate)
        ids, _ = self._recorder.route(logits, layer.gate_bias, c.routing)
        self.step.guess(number, ids)

    def route(self, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Buffer, Buffer]:
        assert self._layer is not None
        return self.step.route(self._layer, logits, bias, rule)

    def acquire(self, number: int, ids: Buffer) -> None:
        self._look_ahead(number + 1)
        self.step.acquire(number, ids)

    def experts(self, number: int, x: Buffer, ids: Buffer, weights: Buffer) -> Buffer:
        return self.step.run_experts(number, x, ids, weights)
