"""The forward pass of every decoder that a `Description` can say.

Written once in operations: prompts compute at once, decoding is recorded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cached_property

import torch

from engine.families.base import NO_TRACE, Batch, KvCache, Model, ModelInfo, Trace
from engine.families.decoder.cache import CacheLayout, DecoderCache
from engine.families.decoder.description import Attention, Description, Experts
from engine.families.decoder.operations import DecoderEager, DecoderOperations, DecoderParts, DecoderRecorded
from engine.families.decoder.stored import RowsInFile
from engine.families.decoder.weights import AttentionWeights, DecoderWeights, MlpWeights, tensors_in
from engine.families.places import HOST
from engine.layers.operations import Value
from memory.telemetry import Telemetry
from quant.errors import BudgetError
from quant.kernels.choice import recorder_of
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels

MAX_ROWS = 16  # of a recorded step; larger ones are computed operation by operation


class DecodingCache(DecoderCache):
    """A cache, and the recorded step that decodes with it; None where nothing is recorded."""

    decoder: DecoderRecorded | None = None


class Decoder(Model):
    """A loaded model of any of these families."""

    def __init__(
        self, description: Description, info: ModelInfo, kernels: Kernels, weights: DecoderWeights
    ) -> None:
        self.description = description
        self.info = info
        self.kernels = kernels
        self.weights = weights
        self.parts = DecoderParts(description, weights, kernels)
        self.cache_layout = CacheLayout.of(description, tuple(layer.device for layer in weights.layers))

    def close(self) -> None:
        if self.weights.experts is not None:
            self.weights.experts.close()

    @property
    def tier_bytes(self) -> dict[str, int]:
        experts = self.weights.experts
        found = defaultdict(int, {} if experts is None else experts.tier_bytes)
        found["dram"] += 0
        for tier, nbytes in self._dense_bytes.items():
            found[tier] += nbytes
        return dict(found)

    @cached_property
    def _dense_bytes(self) -> dict[str, int]:
        """Bytes by tier of what every token reads."""
        weights, places = self.weights, self.weights.places
        placed = [(places.head_tier, weights.norm), (places.head_tier, weights.head)]
        if weights.embed is not weights.head and not isinstance(weights.embed, RowsInFile):
            placed.append(("dram", weights.embed))
        for tier, layer in zip(places.tiers, weights.layers, strict=True):
            placed += [(tier, tensor) for tensor in tensors_in(layer)]
        found: dict[str, int] = defaultdict(int)
        for tier, tensor in placed:
            found[tier] += tensor.nbytes
        return found

    def expert_tiers(self) -> list[list[str]]:
        if self.weights.experts is None:
            return []
        tiers: list[list[str]] = [[] for _ in self.description.layers]
        for layer, held in zip(
            self.description.expert_layers, self.weights.experts.expert_locations(), strict=True
        ):
            tiers[layer] = held
        return tiers

    @property
    def telemetry(self) -> Telemetry | None:
        return None if self.weights.experts is None else self.weights.experts.telemetry

    # ---------------------------------------------------------------------------------------- the cache

    def new_cache(self, slots: int, capacity: int) -> DecodingCache:
        """Raises BudgetError where a GPU's part is more than was kept free there when loading."""
        needed: dict[str, int] = defaultdict(int)
        for layer, tier in enumerate(self.weights.places.tiers):
            needed[tier] += self.cache_layout.layer_bytes(layer, slots, capacity)
        for tier, room in self.weights.places.kv_room.items():
            if needed[tier] > room:
                raise BudgetError(
                    f"{tier}: the KV cache of {slots} sequences of {capacity} tokens needs "
                    f"{needed[tier] / 1e6:,.1f} MB, but only {room / 1e6:,.1f} MB was reserved for it"
                )
        cache = DecodingCache(self.cache_layout, slots, capacity)
        recorder = self._recorder()
        if recorder is not None:
            cache.decoder = self._record(recorder, cache)
            cache.program = cache.decoder.program
        return cache

    def cache_bytes(self, slots: int, capacity: int) -> int:
        kv = sum(
            self.cache_layout.layer_bytes(layer, slots, capacity)
            for layer, device in enumerate(self.cache_layout.devices)
            if device == HOST
        )
        return kv + self._arena_bytes

    @cached_property
    def _arena_bytes(self) -> int:
        """Bytes of a program's buffers, whatever the cache."""
        program = self.new_cache(slots=1, capacity=1).program
        return 0 if program is None else program.nbytes

    # -------------------------------------------------------------------------------------- the forward

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KvCache, trace: Trace | None = None) -> torch.Tensor:
        assert isinstance(cache, DecodingCache)
        for segment in batch.segments:
            cache.admit(segment)
        if trace is None and cache.program is not None and batch.is_decode(MAX_ROWS):
            assert cache.decoder is not None
            logits = cache.decoder.run(batch, self._embedded(batch.token_ids))
        else:
            logits = self._compute(batch, cache, trace or NO_TRACE)
        for segment in batch.segments:
            cache.advance(segment)
        return logits

    def _compute(self, batch: Batch, cache: DecoderCache, trace: Trace) -> torch.Tensor:
        """The logits of any batch, operation by operation."""
        with DecoderEager(self.parts, batch, cache, trace) as ops:
            x = self._layers(ops, self._embedded(batch.token_ids))
            return self._logits(ops, x[batch.logit_rows.to(x.device)]).float().cpu()

    def _recorder(self) -> Recorder | None:
        """Notes steps, where all that every token reads lies in host memory."""
        devices = {layer.device for layer in self.weights.layers} | {self.weights.norm.device}
        return recorder_of(self.kernels, MAX_ROWS) if devices == {HOST} else None

    def _record(self, recorder: Recorder, cache: DecoderCache) -> DecoderRecorded:
        """A program that decodes with `cache`."""
        ops = DecoderRecorded(self.parts, recorder, cache)
        source = recorder.input(self.description.hidden)
        ops.finish(source, self._logits(ops, self._layers(ops, source)))
        return ops

    def _layers(self, ops: DecoderOperations[Value], x: Value) -> Value:
        """All layers: x `[tokens, hidden]` to the same."""
        eps, factor = self.description.eps, self.description.residual_factor
        for number, (layer, weights) in enumerate(
            zip(self.description.layers, self.weights.layers, strict=True)
        ):
            ops.at_layer(number)
            x = ops.move(x, weights.device)
            has_experts = isinstance(layer.feed_forward, Experts)
            # Attention leaves time to prefetch, but not on a GPU; before the first layer the disk is idle.
            if has_experts and (number == 0 or weights.device == HOST):
                ops.prefetch(number, x, None)
            normed = ops.norm(x, weights.attn_norm, eps)
            attended = self._attention(ops, number, layer.attention, weights.attention, normed)
            x = ops.add(x, _scaled(ops, attended, factor))
            if isinstance(weights.feed_forward, MlpWeights):
                y = _mlp(ops, ops.norm(x, weights.ffn_norm, eps), weights.feed_forward)
            else:
                y = self._experts(ops, number, x)
            x = ops.add(x, _scaled(ops, y, factor))
            ops.trace(f"hidden.{number}", x)
        ops.at_layer(None)
        return x

    def _experts(self, ops: DecoderOperations[Value], number: int, x: Value) -> Value:
        """Routed experts, and the network beside them that every token uses: x, not normed, to the same."""
        weights, router = self.weights.layers[number], self.parts.router(number)
        normed = ops.norm(x, weights.ffn_norm, self.description.eps)
        (logits,) = ops.linears(normed, router.matrix)
        if router.bias is not None:
            logits = ops.add_bias(logits, router.bias)
        ids, factors = ops.choose(logits, router.choice_bias, self.parts.experts(number).router.choice)
        ops.trace(f"router_ids.{number}", ids)
        ops.trace(f"router_weights.{number}", factors)
        ops.acquire(number, ids)
        # Computed while missing experts arrive.
        shared = None if router.shared is None else _mlp(ops, normed, router.shared)
        if number + 1 in self.description.expert_layers:
            y = None if shared is None else _scaled(ops, shared, self.description.residual_factor)
            ops.prefetch(number + 1, x, y)
        out = ops.experts(number, normed, ids, factors)
        return out if shared is None else ops.add(out, shared)

    def _attention(
        self, ops: DecoderOperations[Value], number: int, a: Attention, w: AttentionWeights, x: Value
    ) -> Value:
        """Attention of normed x `[tokens, hidden]`, to the same."""
        eps = self.description.eps
        q, k, v = (
            value if bias is None else ops.add_bias(value, bias)
            for value, bias in zip(ops.linears(x, w.q, w.k, w.v), (w.q_bias, w.k_bias, w.v_bias), strict=True)
        )
        if w.q_norm is not None and w.k_norm is not None:
            norm = ops.norm_heads if a.qk_norm == "head" else ops.norm
            q, k = norm(q, w.q_norm, eps), norm(k, w.k_norm, eps)
        if a.clip is not None:
            q, k, v = (ops.clip(value, a.clip) for value in (q, k, v))
        q, k = ops.rotate(q, a.heads), ops.rotate(k, a.kv_heads)
        if a.scale is not None:
            q = _scaled(ops, q, a.scale * math.sqrt(a.head_dim))  # kernels scale by its inverse
        (out,) = ops.linears(ops.attend(number, q, k, v, a.window, w.sinks), w.o)
        return out if w.o_bias is None else ops.add_bias(out, w.o_bias)

    def _logits(self, ops: DecoderOperations[Value], x: Value) -> Value:
        x = ops.norm(ops.move(x, self.weights.norm.device), self.weights.norm, self.description.eps)
        (logits,) = ops.linears(x, self.weights.head)
        return _scaled(ops, logits, self.description.logits_factor)

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding as float32; no others are decoded."""
        embed = self.weights.embed
        if isinstance(embed, RowsInFile):
            rows = embed.decoded(token_ids)
        elif isinstance(embed, torch.Tensor):
            rows = embed[token_ids].float()
        else:
            rows = self.kernels.gather_rows(embed, token_ids)
        factor = self.description.embedding_factor
        return rows if factor == 1 else rows * factor


def _mlp(ops: DecoderOperations[Value], x: Value, weights: MlpWeights) -> Value:
    """A gated feed-forward network of normed x `[tokens, hidden]`."""
    gate, up = ops.linears(x, weights.gate, weights.up)
    (y,) = ops.linears(ops.gated(gate, up, math.inf), weights.down)
    return y


def _scaled(ops: DecoderOperations[Value], x: Value, factor: float) -> Value:
    return x if factor == 1 else ops.scale(x, factor)
