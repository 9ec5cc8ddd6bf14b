"""DeepSeek-V4: the forward pass.

Parallel residual streams (mHC, each sublayer's own mix), one shared key=value latent per token, sliding
windows with compressed entries that every layer makes for itself: of eight tokens, every four, which an
indexer chooses among, or of 128. Routed experts in every layer; the first layers' are chosen by token ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.cache.grouped import GroupedCache, GroupedShape
from engine.families.base import NO_TRACE, Batch, KvCache, ModelInfo, Trace
from engine.families.deepseek_v4.config import V4Config
from engine.families.deepseek_v4.eager import V4Eager
from engine.families.deepseek_v4.operations import V4Operations, V4Parts
from engine.families.deepseek_v4.recorded import V4Recorded
from engine.families.deepseek_v4.shape import cache_shape
from engine.families.deepseek_v4.weights import LayerWeights, V4Weights
from engine.families.on_gpus.record import record_on_gpus
from engine.families.places import HOST
from engine.families.streams.forward import StreamModel
from engine.families.streams.operations import MAX_ROWS, StreamMix, Written
from engine.layers.operations import Value
from quant.formats.kv_names import KvFormat
from quant.kernels.cpu.program import Buffer
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels

if TYPE_CHECKING:
    from engine.families.deepseek_v4.on_gpus import V4OnGpus
    from engine.families.on_gpus.step import RecorderOn
    from memory.experts.coordinator import Coordinator


class V4Cache(GroupedCache):
    """A cache, and the recorded step that decodes with it; None where nothing is recorded."""

    decoder: V4Recorded | V4OnGpus | None = None
    on_host: int = 0  # bytes of programs in host memory, where others are on GPUs

    def bytes_at(self, tokens: int) -> int:
        return super().bytes_at(tokens) + (self.on_host if self.program is None else self.program.nbytes)


class DeepseekV4(StreamModel):
    """A loaded V4 model."""

    config: V4Config
    weights: V4Weights
    cache_shape: GroupedShape

    def __init__(
        self,
        config: V4Config,
        info: ModelInfo,
        weights: V4Weights,
        kernels: Kernels,
        kv_format: KvFormat,
    ) -> None:
        super().__init__(config, info, weights, kernels)
        self.kv_format = kv_format
        self.parts = V4Parts(config, weights, kernels)
        devices = tuple(layer.device for layer in weights.layers)
        self.cache_shape = cache_shape(config, devices, kv_format)
        self._coordinator: Coordinator | None = None  # of recorded steps on GPUs
        self._captures = False
        self._targets: tuple[int, ...] = ()  # layers behind which draft stages read
        self._captured: list[torch.Tensor] = []

    def close(self) -> None:
        if self._coordinator is not None:
            self._coordinator.close()
        super().close()

    def _beside(self) -> tuple[list[object], list[object]]:
        with_head, _ = super()._beside()
        return [*with_head, self.weights.hc_head], [layer.token_experts for layer in self.weights.layers]

    def capture(self) -> bool:
        """The streams that leave the last layer, `[tokens, hc * hidden]`; where there are DSpark's stages,
        the mean of those that leave each of the layers that `dspark_target_layer_ids` names, side by side.
        On GPUs nothing is captured yet."""
        self._captures = not self._is_on_gpus
        if self._captures and self.config.dspark is not None:
            self._targets = self.config.dspark.target_layer_ids
        return self._captures

    def captured(self) -> list[torch.Tensor]:
        return self._captured

    def drop_captured(self) -> None:
        self._captured = []

    def new_cache(self, slots: int, capacity: int) -> V4Cache:
        """Raises BudgetError where a GPU's part is more than was kept free there when loading."""
        self.weights.places.check_kv(slots, capacity, self.cache_shape.layer_bytes)
        cache = V4Cache(self.cache_shape, slots, capacity)
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
            cache = GroupedCache(self.cache_shape, 1, capacity)
            return self._record_on_gpus(cache, only_look=True)[1][HOST] if self._is_on_gpus else 0
        program = self._record(recorder, GroupedCache(self.cache_shape, 1, capacity)).program
        assert program is not None
        return program.nbytes

    def _record(self, recorder: Recorder, cache: GroupedCache) -> V4Recorded:
        """A program that decodes with `cache`."""
        ops = V4Recorded(self.parts, recorder, cache)
        source = ops.begin()
        streams = self._layers(ops, source)
        if self._captures and not self._targets:
            ops.captured = [streams]
            recorder.keep(streams)
        ops.finish(source, self._logits(ops, streams))
        return ops

    def _record_on_gpus(
        self, cache: GroupedCache, *, only_look: bool = False
    ) -> tuple[V4OnGpus | None, dict[torch.device, int]]:
        """Programs that decode with `cache`, and their bytes by device: see `record_on_gpus`."""

        def note(on: RecorderOn) -> tuple[V4OnGpus, Buffer]:
            from engine.families.deepseek_v4.on_gpus import V4OnGpus
            from engine.families.on_gpus.answers import coordinator_of

            if self._coordinator is None:
                self._coordinator = coordinator_of(self.weights.experts, self.config.swiglu_limit)
            ops = V4OnGpus(self.parts, on, cache, self.weights.layers[0].device, self._coordinator)
            return ops, self._logits(ops, self._layers(ops, ops.begin(self.config.hidden_size)))

        return record_on_gpus(
            note, self._devices, self.kernels, MAX_ROWS, cache.capacity, self.weights.places.step_room,
            only_look=only_look,
        )  # fmt: skip

    def _step(self, batch: Batch, cache: KvCache, trace: Trace | None) -> torch.Tensor:
        assert isinstance(cache, V4Cache)
        decoder = cache.decoder
        if decoder is not None and not isinstance(decoder, V4Recorded):
            decoder.check()
        if trace is None and decoder is not None and batch.is_decode(MAX_ROWS):
            return self._replay(decoder, batch)
        return self._compute(batch, cache, trace or NO_TRACE)

    def _replay(self, decoder: V4Recorded | V4OnGpus, batch: Batch) -> torch.Tensor:
        """The logits of a batch of new tokens, by recorded programs."""
        if not isinstance(decoder, V4Recorded):
            with torch.inference_mode():
                return decoder.run(batch)
        logits = decoder.run(batch)
        if self._captures:
            self._captured = by_segment(decoder.captured_rows(len(batch.ids)), batch)
        return logits

    @torch.inference_mode()
    def _compute(self, batch: Batch, cache: V4Cache, trace: Trace) -> torch.Tensor:
        """The logits of any batch, operation by operation."""
        embedded = self.weights.embed[batch.token_ids].float()  # [tokens, hidden]
        with V4Eager(self.parts, batch, cache, trace) as ops:
            streams = self._layers(ops, embedded)
            if self._captures:
                self._captured = by_segment(ops.captured if self._targets else streams, batch)
            return self._logits(ops, streams[batch.logit_rows.to(streams.device)]).float().cpu()

    def _layers(self, ops: V4Operations[Value], embedded: Value) -> Value:
        """All layers: the streams, `[rows, hc * hidden]`."""
        return self._through(ops, ops.streams(embedded, self.config.hc_mult))

    def _through(self, ops: V4Operations[Value], streams: Value) -> Value:
        """Streams through all layers."""
        c, weights = self.config, self.weights
        self._foresee(ops, 0, streams, None)  # the disk has nothing to do until then
        for number, layer in enumerate(weights.layers):
            ops.at_layer(number)
            (streams,) = ops.move(layer.device, streams)
            if number >= c.hashed_layers and number > 0 and layer.device == HOST:
                self._foresee(ops, number, streams, None)  # on a GPU, attention leaves no time to use it

            mix = ops.mix(layer.hc_attn, streams)
            x = ops.norm(ops.read_streams(streams, mix.pre), layer.attn_norm, c.rms_norm_eps)
            y = self._attend(ops, number, layer, x)
            ops.trace(f"attn_out.{number}", y)
            streams = ops.write_streams(streams, y, mix)

            mix = ops.mix(layer.hc_ffn, streams)
            y = self._experts(ops, number, streams, mix)
            streams = ops.write_streams(streams, y, mix)
            if number in self._targets:
                ops.capture(streams)
            ops.trace(f"streams.{number}", streams, c.hc_mult, c.hidden_size)
        ops.at_layer(None)
        return streams

    def _logits(self, ops: V4Operations[Value], streams: Value) -> Value:
        weights = self.weights
        (streams,) = ops.move(weights.norm.device, streams)
        x = ops.read_streams(streams, ops.reading(weights.hc_head, streams))
        (logits,) = ops.linears(ops.norm(x, weights.norm, self.config.rms_norm_eps), weights.head)
        return logits

    def _attend(self, ops: V4Operations[Value], number: int, layer: LayerWeights, x: Value) -> Value:
        """Attention of all rows, `[rows, hidden]` to the same, whose buffers are those of some at a time."""
        return ops.by_rows(lambda rows: self._attention(ops, number, layer, rows), x)

    def _attention(self, ops: V4Operations[Value], number: int, layer: LayerWeights, x: Value) -> Value:
        """`[rows, hidden]` to the same."""
        c, compressed = self.config, self.config.ratios[number] > 0
        qr, q, kv = self._latents(ops, layer.attn, x)
        q = ops.norm_heads(q, layer.head_norm, c.rms_norm_eps)
        q = ops.rotate(q, c.num_attention_heads, compressed=compressed)
        kv = ops.rotate(kv, 1, compressed=compressed)
        if layer.compressor is not None:
            ops.compress(number, 0, layer.compressor, x)
        if layer.index_compressor is not None:
            ops.compress(number, 1, layer.index_compressor, x)
        if layer.indexer is not None:
            self._select(ops, number, layer.indexer, qr, x)
        out = ops.attend(number, layer.attn, q, kv)
        out = ops.rotate(out, c.num_attention_heads, compressed=compressed, backwards=True)
        (y,) = ops.linears(ops.blocks(out, layer.attn.wo_a), layer.attn.wo_b)
        return y

    def _experts(self, ops: V4Operations[Value], number: int, streams: Value, mix: StreamMix[Value]) -> Value:
        """Routed experts and the shared one, `[rows, hidden]`, which `mix` reads and will write."""
        c, layer = self.config, self.weights.layers[number]
        x = ops.norm(ops.read_streams(streams, mix.pre), layer.ffn_norm, c.rms_norm_eps)
        (logits,) = ops.linears(x, layer.gate)
        if layer.token_experts is None:
            ids, weights = ops.route(logits, layer.gate_bias, c.routing)
        else:
            ids = ops.by_token(number, layer.token_experts)
            weights = ops.weigh(logits, ids, c.routing)
        ops.trace(f"router_ids.{number}", ids)
        ops.trace(f"router_weights.{number}", weights)
        ops.acquire(number, ids)
        y = self._shared(ops, number, x)  # computed while missing experts arrive
        if number + 1 < c.layers:
            self._foresee(ops, number + 1, streams, (y, mix))
        return ops.add(ops.experts(number, x, ids, weights), y)

    def _foresee(
        self,
        ops: V4Operations[Value],
        number: int,
        streams: Value,
        written: Written[Value],
    ) -> None:
        """Prefetch the experts that a layer will need: as the token ids say, or as its router would choose
        from the streams so far, with what will be written to them where that is known."""
        if not ops.wants_guesses(number):
            return
        c, layer = self.config, self.weights.layers[number]
        if layer.token_experts is not None:
            return ops.prefetch(number, ops.by_token(number, layer.token_experts))
        if written is not None:
            y, mix = written
            streams = ops.write_streams(streams, y, mix)
        (streams,) = ops.move(layer.device, streams)
        x = ops.read_streams(streams, ops.reading(layer.hc_ffn.reading, streams))
        (logits,) = ops.linears(ops.norm(x, layer.ffn_norm, c.rms_norm_eps), layer.gate)
        ids, _ = ops.route(logits, layer.gate_bias, c.routing)
        ops.prefetch(number, ids)


def by_segment(rows: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """A batch's rows, those of each segment."""
    return list(torch.split(rows, [segment.length for segment in batch.segments]))
