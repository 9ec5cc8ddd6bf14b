"""Predictions of a layer's experts, made before the layer, for the expert store to prefetch them.

The previous layer's routed experts and the layer's own attention change the streams little, so its router
predicts most of its choice without them.
"""

from __future__ import annotations

import torch

from engine.families.deepseek_v41.operations import V41Parts
from engine.families.streams.operations import Written
from engine.layers.engram_lookup import StepRows

ALL = slice(None)


class Guesses:
    """The predictions of one step, on tensors of its tokens.

    kept       which of the step's tokens the tensors have rows of, ascending
    engram_kv  keys and values of table rows by layer, and of which tokens, until the layer uses them: made
               for a prediction
    """

    def __init__(self, parts: V41Parts, rows: StepRows | None, kept: torch.Tensor) -> None:
        self._parts = parts
        self._rows = rows
        self.kept = kept
        self.engram_kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prefetch(
        self,
        number: int,
        streams: torch.Tensor,
        pre: torch.Tensor,
        written: Written[torch.Tensor],
    ) -> None:
        """See `V41Operations.prefetch`: streams `[tokens, hc * hidden]`, pre `[tokens, hc]`."""
        store, kernels, config = self._parts.weights.experts, self._parts.kernels, self._parts.config
        if not store.wants_guesses(number):
            return
        layer = self._parts.weights.layers[number]
        tokens, hc = pre.shape
        parallel = streams.view(tokens, hc, -1)
        if written is not None:
            y, mix = written
            parallel = kernels.mix_streams(parallel, y, mix.post, mix.combine.view(tokens, hc, hc))
            parallel = self._with_engram(number, parallel)
        # `pre` was made before; the layer's experts will read with its attention's mix, which is like it.
        x = kernels.weighted_sum(parallel, pre.to(parallel.device)).to(layer.device)
        logits = kernels.linear(kernels.rms_norm(x, layer.ffn_norm, config.rms_norm_eps), layer.gate)
        ids, _ = kernels.route(logits, layer.gate_bias, config.routing)
        store.prefetch(number, ids.t().flatten().cpu().tolist())  # every token's top choice first

    def wait_for_kv(self, number: int, rows: slice = ALL) -> torch.Tensor:
        """Keys and value of the tokens' table rows for a layer, `[rows, (hc + 1) * hidden]`: of all, or of
        some after the other."""
        if number not in self.engram_kv:
            return self._kv(number, rows)
        kv, kept = self.engram_kv[number]
        if rows == ALL or rows.stop >= len(self.kept):
            del self.engram_kv[number]
        if len(kept) == len(self.kept):
            return kv[rows]
        return kv[torch.searchsorted(kept, self.kept[rows]).to(kv.device)]

    def _kv(self, number: int, rows: slice) -> torch.Tensor:
        layer = self._parts.weights.layers[number]
        assert layer.engram is not None
        assert self._rows is not None
        values = self._rows.wait(self._parts.table(number))  # [tokens, columns * dim]
        values = (values[rows] if len(values) == len(self.kept) else values[self.kept[rows]]).to(layer.device)
        return layer.engram.keys_and_value(self._parts.kernels, values)

    def _with_engram(self, number: int, streams: torch.Tensor) -> torch.Tensor:
        """About what the layer's Engram will make of the streams; unchanged where rows are not there yet."""
        layer = self._parts.weights.layers[number]
        if layer.engram is None or self._rows is None:
            return streams
        if not self._rows.is_there(self._parts.table(number)):
            return streams
        streams = streams.to(layer.device)
        kv = self._kv(number, ALL)
        self.engram_kv[number] = kv, self.kept
        gates, value = layer.engram.gates_and_value(self._parts.kernels, streams, kv)
        return streams + gates.unsqueeze(-1) * value.unsqueeze(1)
