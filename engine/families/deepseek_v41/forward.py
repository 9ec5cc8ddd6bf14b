"""DeepSeek-V4.1: the forward pass.

Parallel residual streams (mHC, lagged mix), one shared key=value latent per token, sliding windows
with compressed entries chosen by an indexer, routed experts in every layer, and Engram lookups before some
layers. Section numbers refer to docs/deepseek-v41.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.cache.sparse import CacheShape, SparseCache
from engine.families.base import NO_TRACE, Batch, KvCache, ModelInfo, Trace
from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.eager import V41Eager
from engine.families.deepseek_v41.operations import V41Operations, V41Parts
from engine.families.deepseek_v41.recorded import V41Recorded
from engine.families.deepseek_v41.weights import CompressorWeights, LayerWeights, V41Weights
from engine.families.on_gpus.record import record_on_gpus
from engine.families.places import HOST
from engine.families.streams.forward import StreamModel
from engine.families.streams.operations import MAX_ROWS, StreamMix
from engine.layers.engram_hash import EngramHash
from engine.layers.engram_lookup import EngramLookup, StepRows
from engine.layers.operations import Value
from memory.planner.published import KV_MARGIN
from quant.formats.kv import v41_rows
from quant.formats.kv_names import KvFormat
from quant.kernels.cpu.program import Buffer
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.cpu.row_notes import MOST_HISTORY, Ngrams
from quant.kernels.interface import Kernels

if TYPE_CHECKING:
    from engine.families.deepseek_v41.on_gpus import V41OnGpus
    from engine.families.on_gpus.step import RecorderOn
    from memory.experts.coordinator import Coordinator


class V41Cache(SparseCache):
    """A cache, and the recorded step that decodes with it; None where nothing is recorded."""

    decoder: V41Recorded | V41OnGpus | None = None
    on_host: int = 0  # bytes of programs in host memory, where others are on GPUs

    def bytes_at(self, tokens: int) -> int:
        return super().bytes_at(tokens) + (self.on_host if self.program is None else self.program.nbytes)


class DeepseekV41(StreamModel):
    """A loaded V4.1 model."""

    config: V41Config
    weights: V41Weights
    cache_shape: CacheShape

    def __init__(
        self,
        config: V41Config,
        info: ModelInfo,
        weights: V41Weights,
        token_map: torch.Tensor,
        kernels: Kernels,
        hashing: EngramHash | None,
        kv_format: KvFormat,
    ) -> None:
        super().__init__(config, info, weights, kernels)
        self.kv_format = kv_format
        self.token_map = token_map
        self._token_keys = token_map.numpy()
        self.keeps_whole_states = not config.has_tail
        self.engram: EngramLookup | None = None
        if hashing is not None:
            self.engram = EngramLookup(config.engram_layer_ids, hashing, weights.engram)
        self.parts = V41Parts(config, weights, kernels, self._ngrams(hashing))
        self._coordinator: Coordinator | None = None  # of recorded steps on GPUs
        self._targets: tuple[int, ...] = ()  # layers whose input is captured
        self._captured: Callable[[], list[torch.Tensor]] = list  # of the last forward
        self.cache_shape = CacheShape(
            layers=config.num_hidden_layers,
            window=config.sliding_window,
            head_dim=config.head_dim,
            index_dim=config.index_head_dim,
            sources={layer: config.compress_ratios[layer] for layer in config.kv_source_layer_ids},
            history=config.engram_max_ngram_size - 1 if config.engram_layer_ids else 0,
            history_pad=int(token_map[config.engram_pad_token_id]) if config.engram_layer_ids else 0,
            margin=KV_MARGIN,
            devices=tuple(layer.device for layer in weights.layers),
            rows=v41_rows(kv_format, config.head_dim, config.qk_rope_head_dim, config.index_head_dim),
        )

    def close(self) -> None:
        if self._coordinator is not None:
            self._coordinator.close()
        super().close()
        self.weights.engram.close()

    @property
    def held_bytes(self) -> dict[str, dict[str, int]]:
        found = super().held_bytes
        if nbytes := self.weights.engram.nbytes:
            found["dram"]["engram"] = nbytes
        return found

    def capture(self) -> bool:
        """The mean over streams of the inputs of the layers that `dspark_target_layer_ids` names, side by
        side. On GPUs nothing is captured yet."""
        if self.config.dspark is None or self._is_on_gpus:
            return False
        self._targets = self.config.dspark.target_layer_ids
        return True

    def captured(self) -> list[torch.Tensor]:
        return self._captured()

    def drop_captured(self) -> None:
        self._captured = list

    def new_cache(self, slots: int, capacity: int) -> V41Cache:
        """Raises BudgetError where a GPU's part is more than was kept free there when loading."""
        self.weights.places.check_kv(slots, capacity, self.cache_shape.layer_bytes)
        cache = V41Cache(self.cache_shape, slots, capacity)
        recorder = self._recorder()
        if recorder is not None:
            cache.decoder = self._record(recorder, cache)
            cache.program = cache.decoder.program
        elif self._is_on_gpus:
            cache.decoder, nbytes = self._record_on_gpus(cache)
            cache.on_host = nbytes[HOST]
            cache.step_parts = [] if cache.decoder is None else cache.decoder.parts()
        return cache

    def _arena_bytes(self, capacity: int) -> int:
        recorder = self._recorder()
        if recorder is None:
            cache = SparseCache(self.cache_shape, 1, capacity)
            return self._record_on_gpus(cache, only_look=True)[1][HOST] if self._is_on_gpus else 0
        program = self._record(recorder, SparseCache(self.cache_shape, 1, capacity)).program
        assert program is not None
        return program.nbytes

    def _ngrams(self, hashing: EngramHash | None) -> Ngrams | None:
        """How native code finds Engram rows, where all tables lie in DRAM and no prediction needs them."""
        c = self.config
        tables = [self.weights.engram.in_memory(layer) for layer in c.engram_layer_ids]
        if hashing is None or None in tables or hashing.history > MOST_HISTORY:
            return None
        if not self.weights.experts.is_still or not isinstance(self.weights.embed, torch.Tensor):
            return None
        return Ngrams(
            keys=self.token_map,
            pad=int(self.token_map[c.engram_pad_token_id]),
            multipliers=torch.from_numpy(hashing.multipliers),
            primes=torch.from_numpy(hashing.primes),
            offsets=torch.from_numpy(hashing.offsets),
            heads=hashing.heads,
            row_tables=[table for table in tables if table is not None],
            row_width=c.engram_head_dim,
        )

    def _record_on_gpus(
        self, cache: SparseCache, *, only_look: bool = False
    ) -> tuple[V41OnGpus | None, dict[torch.device, int]]:
        """Programs that decode with `cache`, and their bytes by device: see `record_on_gpus`."""

        def note(on: RecorderOn) -> tuple[V41OnGpus, Buffer]:
            from engine.families.deepseek_v41.on_gpus import V41OnGpus
            from engine.families.on_gpus.answers import coordinator_of

            if self._coordinator is None:
                self._coordinator = coordinator_of(self.weights.experts, self.config.swiglu_limit)
            ops = V41OnGpus(self.parts, on, cache, self.weights.layers[0].device, self._coordinator)
            source = ops.begin(self.config.hidden_size if self.config.is_first else self.config.state_width)
            return ops, self._result(ops, *self._layers(ops, source))

        return record_on_gpus(
            note, self._devices, self.kernels, MAX_ROWS, cache.capacity, self.weights.places.step_room,
            only_look=only_look,
        )  # fmt: skip

    def expect(self, drawn: Sequence[tuple[Sequence[int], int]]) -> None:
        if self.engram is None or self.parts.ngrams is not None or not drawn:
            return
        history, pad = self.cache_shape.history, self.config.engram_pad_token_id
        ids = [[*[pad] * (history - len(before)), *before[-history:], token] for before, token in drawn]
        self.engram.expect(self._token_keys[ids])

    def _step(self, batch: Batch, cache: KvCache, trace: Trace | None) -> torch.Tensor:
        assert isinstance(cache, V41Cache)
        if not self.config.is_last:
            batch = batch.of_all()
        decoder = cache.decoder
        if decoder is not None and not isinstance(decoder, V41Recorded):
            decoder.check()
        if trace is None and decoder is not None and batch.is_decode(MAX_ROWS):
            return self._replay(decoder, batch, cache)
        return self._compute(batch, cache, trace or NO_TRACE)

    def _replay(self, decoder: V41Recorded | V41OnGpus, batch: Batch, cache: V41Cache) -> torch.Tensor:
        """The logits of a batch of new tokens, by recorded programs."""
        if isinstance(decoder, V41Recorded) and decoder.takes_tokens:
            logits = decoder.run_tokens(batch)
        else:
            with torch.inference_mode():
                logits = decoder.run(batch, self._embedded(batch), self._request_rows(batch, cache))
        if self._targets and isinstance(decoder, V41Recorded):
            self._captured = partial(_captured_by, decoder, batch)
        return logits

    def _embedded(self, batch: Batch) -> torch.Tensor:
        """`[tokens, hidden]` float32; or what another part has handed on."""
        if batch.states is not None:
            return batch.states
        return self.weights.embed[batch.token_ids].float()

    @torch.inference_mode()
    def _compute(self, batch: Batch, cache: V41Cache, trace: Trace) -> torch.Tensor:
        """The logits of any batch, operation by operation."""
        embedded, rows = self._embedded(batch), self._request_rows(batch, cache)
        if rows is not None:
            trace.add("engram_rows", rows.rows)
        with V41Eager(self.parts, batch, cache, trace, rows) as ops:
            streams, pre = self._layers(ops, embedded)
            if self._targets:
                self._captured = partial(ops.captured, len(self._targets))
            wanted = ops.rows_of(batch.logit_rows).to(streams.device)
            return self._result(ops, streams[wanted], pre[wanted]).float().cpu()

    def _record(self, recorder: Recorder, cache: SparseCache) -> V41Recorded:
        """A program that decodes with `cache`."""
        ops = V41Recorded(self.parts, recorder, cache)
        source = ops.begin()
        ops.finish(source, self._result(ops, *self._layers(ops, source)))
        return ops

    def _request_rows(self, batch: Batch, cache: SparseCache) -> StepRows | None:
        """Request every Engram row that the tokens need."""
        if self.engram is None:
            return None
        keys, asked, stop = self._token_keys[batch.token_ids.numpy()], [], 0
        for segment in batch.segments:
            start, stop = stop, stop + segment.length
            asked.append(cache.extend_history(segment, keys[start:stop]))
        return self.engram.begin(asked)

    def _layers(self, ops: V41Operations[Value], embedded: Value) -> tuple[Value, Value]:
        """All layers: the streams, `[rows, hc * hidden]`, and the mix that the head reads with."""
        c, weights = self.config, self.weights
        streams, pre = (ops.streams if c.is_first else ops.received)(embedded, c.hc_mult)
        ops.prefetch(0, streams, pre, None)  # the disk has nothing to do until then
        for number, layer in enumerate(weights.layers):
            ops.at_layer(number)
            if number >= c.first_tail_layer:
                narrowed = ops.narrow(number, streams, pre)
                if narrowed is None:
                    break  # amid a prompt, nothing later looks back on what these layers would make
                streams, pre = narrowed
            streams, pre = ops.move(layer.device, streams, pre)
            if layer.engram is not None:
                streams = ops.engram(number, streams)
            if number in self._targets:
                ops.capture(streams)

            x = ops.norm(ops.read_streams(streams, pre), layer.attn_norm, c.rms_norm_eps)
            if layer.compressor is not None:
                self._compress(ops, number, layer.compressor, x)
                if number + 1 == c.first_tail_layer and c.has_tail:
                    narrowed = ops.narrow(number, streams, pre, x)
                    if narrowed is None:
                        break  # nor on what this one would make but entries
                    streams, pre, x = narrowed

            mix = ops.mix(layer.hc_attn, streams)
            if number > 0 and layer.device == HOST:  # on a GPU, attention leaves no time to use it
                ops.prefetch(number, streams, mix.pre, None)
            y = self._attend(ops, number, layer, x)
            ops.trace(f"attn_out.{number}", y)
            streams, pre = ops.write_streams(streams, y, mix), mix.pre

            mix = ops.mix(layer.hc_ffn, streams)
            y = self._experts(ops, number, streams, pre, mix)
            streams, pre = ops.write_streams(streams, y, mix), mix.pre
            ops.trace(f"streams.{number}", streams, c.hc_mult, c.hidden_size)
        ops.at_layer(None)
        return streams, pre

    def _result(self, ops: V41Operations[Value], streams: Value, pre: Value) -> Value:
        """Logits, or what the next part begins with."""
        if not self.config.is_last:
            return ops.handed(streams, pre)
        (x,) = ops.move(self.weights.norm.device, ops.read_streams(streams, pre))
        (logits,) = ops.linears(ops.norm(x, self.weights.norm, self.config.rms_norm_eps), self.weights.head)
        return logits

    def _compress(
        self, ops: V41Operations[Value], number: int, compressor: CompressorWeights, x: Value
    ) -> None:
        """Entries and index keys of all rows, `[rows, hidden]`."""
        ops.each_rows(lambda rows: ops.compress(number, compressor, rows), x)

    def _attend(self, ops: V41Operations[Value], number: int, layer: LayerWeights, x: Value) -> Value:
        """Attention of all rows, `[rows, hidden]` to the same, whose buffers are those of some at a time."""
        return ops.by_rows(lambda rows: self._attention(ops, number, layer, rows), x)

    def _attention(self, ops: V41Operations[Value], number: int, layer: LayerWeights, x: Value) -> Value:
        """Sections 4.1 to 4.7 but for entries, `[rows, hidden]` to the same."""
        c, compressed = self.config, self.parts.is_compressed(number)
        qr, q, kv = self._latents(ops, layer.attn, x)
        q = ops.rotate(q, c.num_attention_heads, compressed=compressed)
        kv = ops.rotate(kv, 1, compressed=compressed)
        if layer.indexer is not None:
            self._select(ops, number, layer.indexer, qr, x)
        out = ops.attend(number, layer.attn, q, kv)
        out = ops.rotate(out, c.num_attention_heads, compressed=compressed, backwards=True)
        (y,) = ops.linears(ops.blocks(out, layer.attn.wo_a), layer.attn.wo_b)
        return y

    def _experts(
        self, ops: V41Operations[Value], number: int, streams: Value, pre: Value, mix: StreamMix[Value]
    ) -> Value:
        """Section 5: routed experts and the shared one, `[rows, hidden]`.

        They read the streams with `pre`; `mix` says how they will be written to them.
        """
        c, layer = self.config, self.weights.layers[number]
        x = ops.norm(ops.read_streams(streams, pre), layer.ffn_norm, c.rms_norm_eps)
        (logits,) = ops.linears(x, layer.gate)
        ids, weights = ops.route(logits, layer.gate_bias, c.routing)
        ops.trace(f"router_ids.{number}", ids)
        ops.trace(f"router_weights.{number}", weights)
        ops.acquire(number, ids)
        y = self._shared(ops, number, x)  # computed while missing experts arrive
        if number + 1 < c.num_hidden_layers:
            ops.prefetch(number + 1, streams, pre, (y, mix))
        return ops.add(ops.experts(number, x, ids, weights), y)


def _captured_by(decoder: V41Recorded, batch: Batch) -> list[torch.Tensor]:
    """What a program has captured, of each segment."""
    found = decoder.captured_rows(len(batch.ids))
    if len(batch.segments) == 1:
        return [found]
    return list(torch.split(found, [segment.length for segment in batch.segments]))
