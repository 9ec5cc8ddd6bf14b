"""The forward of a draft layer: as a decoder's, on an input that is made of two."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.families.base import NO_TRACE, Batch, ModelInfo
from engine.families.decoder.cache import DecoderCache
from engine.families.decoder.description import Description
from engine.families.decoder.forward import Decoder
from engine.families.decoder.read_weights import DraftWeights
from engine.families.replay import replay
from engine.layers.operations import Operations, Value
from quant.kernels.cpu.program import Buffer
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels


class DraftStep(NamedTuple):
    """Of each wanted row, `[rows, .]`: logits, and the state that a further draft begins with."""

    logits: torch.Tensor
    states: torch.Tensor


class DraftLayer(Decoder):
    """A draft layer, loaded. Its position is that of the token whose hidden state is known."""

    def __init__(
        self, description: Description, info: ModelInfo, kernels: Kernels, weights: DraftWeights
    ) -> None:
        super().__init__(description, info, kernels, weights.decoder, "float32")
        self._draft = weights
        self._embedding: dict[DecoderCache, Buffer] = {}  # of programs that do not read it themselves

    @torch.inference_mode()
    def step(self, batch: Batch, hidden: torch.Tensor, cache: DecoderCache) -> DraftStep:
        """A step of a batch whose ids are the tokens behind those of `hidden` `[tokens, hidden]`."""
        for segment in batch.segments:
            cache.admit(segment)
        program = cache.program
        if program is not None and len(batch.ids) <= program.max_rows:
            program.source[: len(batch.ids)] = hidden
            if cache in self._embedding:
                rows = self._embedded(batch.token_ids)
                program.rows(self._embedding[cache])[: len(rows)] = rows
            logits = replay(program, cache.routed, batch, cache)
            assert cache.last_states is not None
            states = program.rows(cache.last_states)[: len(batch.ids)]
        else:
            ops = self._eager(batch, cache)
            x = self._combined(ops, self._embedded(batch.token_ids), hidden)
            with self._eager_experts(len(batch.ids)) as routed:
                states = self.layers.states(ops, self.layers.run(ops, routed, x, NO_TRACE))
            logits = self.layers.logits(ops, states[batch.logit_rows])
        for segment in batch.segments:
            cache.advance(segment)
        return DraftStep(logits, states[batch.logit_rows])

    def _record(self, recorder: Recorder, cache: DecoderCache) -> None:
        ops = self._notes(recorder, cache)
        source, embed = recorder.input(self.description.hidden), self.weights.embed
        if isinstance(embed, torch.Tensor):
            embedded = recorder.embed(embed, self.description.embedding_factor)
        else:
            embedded = recorder.input(self.description.hidden)
            self._embedding[cache] = embedded
        x = self._combined(ops, embedded, source)
        cache.last_states = self.layers.states(ops, self.layers.run(ops, cache.routed, x, NO_TRACE))
        recorder.keep(cache.last_states)
        cache.program = recorder.finish(source, self.layers.logits(ops, cache.last_states))

    def _combined(self, ops: Operations[Value], embedded: Value, hidden: Value) -> Value:
        """The layer's input, `[tokens, hidden]`."""
        eps, draft = self.description.eps, self._draft
        both = ops.join(
            ops.norm(embedded, draft.of_embedding, eps), ops.norm(hidden, draft.of_hidden, eps), 1
        )
        (x,) = ops.linears(both, draft.combine)
        return x
