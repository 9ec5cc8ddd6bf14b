"""The layers of every decoder that a `Description` can say: the arithmetic of a step.

Written once in `Operations`: prompts compute at once, decoding is recorded.
"""

from __future__ import annotations

import math

from engine.families.base import Trace
from engine.families.decoder.delta_net import DeltaNetWeights, delta_net
from engine.families.decoder.description import DeltaNet, Description, Experts, Mixer, Mla
from engine.families.decoder.latent_forward import LatentAttention
from engine.families.decoder.weights import (
    AttentionWeights,
    DecoderWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    RouterWeights,
)
from engine.families.places import HOST
from engine.layers.operations import Operations, Value
from engine.layers.routed_experts import RoutedExperts
from quant.kernels.interface import ExpertExtras


class DecoderLayers:
    """What a model's layers compute with its weights, and its head behind them."""

    def __init__(self, description: Description, weights: DecoderWeights) -> None:
        self.description = description
        self.weights = weights

    def run(
        self, ops: Operations[Value], routed: RoutedExperts[Value] | None, x: Value, trace: Trace
    ) -> Value:
        """All layers: x `[tokens, hidden]` to the same."""
        eps, factor = self.description.eps, self.description.residual_factor
        latent = LatentAttention(ops, trace)
        layers = zip(self.description.layers, self.weights.layers, strict=True)
        for number, (layer, weights) in enumerate(layers):
            ops.at_layer(number)
            x = ops.move(x, weights.device)
            # Attention on a GPU leaves no time for it, and before the first layer the disk has nothing to do.
            if routed is not None and (number == 0 or weights.device == HOST):
                self._prefetch(ops, routed, number, x)
            normed = ops.norm(x, weights.attn_norm, eps)
            attended = self._attention(ops, latent, number, layer.attention, weights.attention, normed)
            x = ops.add(x, _scaled(ops, attended, factor))
            if isinstance(weights.feed_forward, MlpWeights):
                y = _mlp(ops, ops.norm(x, weights.ffn_norm, eps), weights.feed_forward)
            else:
                assert routed is not None
                y = self._experts(ops, routed, number, x, weights, trace)
            x = ops.add(x, _scaled(ops, y, factor))
            trace.add(f"hidden.{number}", x)
        ops.at_layer(None)
        return x

    def _attention(
        self,
        ops: Operations[Value],
        latent: LatentAttention[Value],
        number: int,
        a: Mixer,
        w: AttentionWeights | MlaWeights | DeltaNetWeights,
        x: Value,
    ) -> Value:
        """Attention of normed x `[tokens, hidden]`, to the same."""
        if isinstance(a, Mla):
            assert isinstance(w, MlaWeights)
            return latent.attend(number, a, w, x)
        eps = self.description.eps
        if isinstance(a, DeltaNet):
            assert isinstance(w, DeltaNetWeights)
            return delta_net(ops, number, a, w, x, eps)
        assert isinstance(w, AttentionWeights)
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
        seen = ops.attend(number, q, k, v, a.window, w.sinks)
        if w.gate is not None:
            (gates,) = ops.linears(x, w.gate)
            seen = ops.gate(seen, gates)
        (out,) = ops.linears(seen, w.o)
        return out if w.o_bias is None else ops.add_bias(out, w.o_bias)

    def states(self, ops: Operations[Value], x: Value) -> Value:
        """The last hidden states, normed."""
        return ops.norm(ops.move(x, self.weights.norm.device), self.weights.norm, self.description.eps)

    def logits(self, ops: Operations[Value], states: Value) -> Value:
        (logits,) = ops.linears(states, self.weights.head)
        return _scaled(ops, logits, self.description.logits_factor)

    def _experts(
        self,
        ops: Operations[Value],
        routed: RoutedExperts[Value],
        number: int,
        x: Value,
        layer: LayerWeights,
        trace: Trace,
    ) -> Value:
        """The feed-forward part of a layer with experts: x `[tokens, hidden]`, not normed, to the same."""
        weights, at = layer.feed_forward, self._store_layer(number)
        assert isinstance(weights, RouterWeights)
        normed = ops.norm(x, layer.ffn_norm, self.description.eps)
        ids, shares = self._route(ops, number, normed, weights)
        trace.add(f"router_ids.{number}", ids)
        trace.add(f"router_weights.{number}", shares)
        routed.acquire(at, ids)
        y, ahead = None, x
        if weights.shared is not None:  # computed while missing experts arrive
            y = _mlp(ops, normed, weights.shared)
            if weights.shared_share is not None:
                y = ops.gate(y, *ops.linears(normed, weights.shared_share))
            ahead = ops.add(x, _scaled(ops, y, self.description.residual_factor))
        self._prefetch(ops, routed, number + 1, ahead)
        out = routed.run(at, normed, ids, shares, self.extras(number, weights))
        return out if y is None else ops.add(out, y)

    def _prefetch(self, ops: Operations[Value], routed: RoutedExperts[Value], number: int, x: Value) -> None:
        """Start prefetching the experts that layer `number` will probably choose, from the residual so far.

        What is still to be added to it changes it little, so the layer's router predicts most of its choice.
        """
        if number not in self.description.expert_layers or not routed.wants_guesses(
            self._store_layer(number)
        ):
            return
        layer = self.weights.layers[number]
        assert isinstance(layer.feed_forward, RouterWeights)
        normed = ops.norm(ops.move(x, layer.device), layer.ffn_norm, self.description.eps)
        ids, _ = self._route(ops, number, normed, layer.feed_forward)
        routed.prefetch(self._store_layer(number), ids)

    def _route(
        self, ops: Operations[Value], number: int, normed: Value, weights: RouterWeights
    ) -> tuple[Value, Value]:
        """The experts that a layer's router chooses for normed x, and their weights: `[tokens, top_k]`."""
        (logits,) = ops.linears(normed, weights.matrix)
        if weights.bias is not None:
            logits = ops.add_bias(logits, weights.bias)
        return ops.route(logits, weights.choice_bias, self._part(number).router.rule)

    def extras(self, number: int, weights: RouterWeights) -> ExpertExtras:
        """What a layer's experts have beyond matrices and SwiGLU."""
        activation = self._part(number).activation
        return ExpertExtras(activation.alpha, activation.shift, weights.expert_biases)

    def _part(self, number: int) -> Experts:
        part = self.description.layers[number].feed_forward
        assert isinstance(part, Experts)
        return part

    def _store_layer(self, number: int) -> int:
        """The number of a layer among those that have experts."""
        return self.description.expert_layers.index(number)


def _mlp(ops: Operations[Value], x: Value, weights: MlpWeights) -> Value:
    """A gated feed-forward network of normed x `[tokens, hidden]`."""
    gate, up = ops.linears(x, weights.gate, weights.up)
    (y,) = ops.linears(ops.gated(gate, up, math.inf), weights.down)
    return y


def _scaled(ops: Operations[Value], x: Value, factor: float) -> Value:
    return x if factor == 1 else ops.scale(x, factor)
