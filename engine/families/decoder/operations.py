"""What a decoder's forward is written in: attention, feed-forward and routed experts, at once or recorded.

Where all experts lie in DRAM, a recorded step is one native call. Where they move, it comes back in every
layer: to predict, to begin what is missing, and to compute when it has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.families.base import Batch, Trace
from engine.families.decoder.cache import DecoderCache
from engine.families.decoder.description import Description, Experts
from engine.families.decoder.weights import DecoderWeights, RouterWeights
from engine.layers.operations import Eager, Operations, Recorded, Value
from engine.layers.recorded_experts import RecordedExperts
from engine.layers.rope import Rotation
from memory.experts.step import ExpertStep
from memory.experts.store import ExpertStore
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import KvPlace, Recorder
from quant.kernels.interface import ExpertExtras, Kernels


class DecoderOperations(Operations[Value], Protocol[Value]):
    """And routed experts: chosen, predicted, begun and computed."""

    def prefetch(self, number: int, x: Value, y: Value | None) -> None:
        """Start prefetching what layer `number` will probably choose for x, or x + y."""
        ...

    def acquire(self, number: int, ids: Value) -> None:
        """Begin layer `number`'s step with these experts: reads and moves start now."""
        ...

    def experts(self, number: int, x: Value, ids: Value, weights: Value) -> Value:
        """The weighted sum of the outputs of the experts that were begun, for normed x."""
        ...

    def trace(self, name: str, value: Value) -> None:
        """Keep a value of this step under `name`, where something is traced."""
        ...


@dataclass(frozen=True)
class DecoderParts:
    """What both kinds of operations need of a loaded model."""

    description: Description
    weights: DecoderWeights
    kernels: Kernels

    @property
    def turn_factor(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return self.description.layers[0].attention.rope.attention_factor

    @property
    def store(self) -> ExpertStore:
        """The expert store of a model that has one."""
        assert self.weights.experts is not None
        return self.weights.experts

    def experts(self, number: int) -> Experts:
        """The experts of layer `number`."""
        experts = self.description.layers[number].feed_forward
        assert isinstance(experts, Experts)
        return experts

    def router(self, number: int) -> RouterWeights:
        """The router of layer `number`."""
        router = self.weights.layers[number].feed_forward
        assert isinstance(router, RouterWeights)
        return router

    def extras(self, number: int) -> ExpertExtras:
        """What the experts of layer `number` have beyond matrices and SwiGLU."""
        activation = self.experts(number).activation
        return ExpertExtras(activation.alpha, activation.shift, self.router(number).expert_biases)

    def store_layer(self, number: int) -> int:
        """The number of a layer among those that have experts."""
        return self.description.expert_layers.index(number)

    def prefetch(self, number: int, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """See `DecoderOperations.prefetch`. What is still to be added changes x little, so the layer's router
        predicts most of its choice."""
        at = self.store_layer(number)
        if not self.store.wants_guesses(at):
            return
        layer, router = self.weights.layers[number], self.router(number)
        x = (x if y is None else x + y).to(layer.device)
        logits = self.kernels.linear(
            self.kernels.rms_norm(x, layer.ffn_norm, self.description.eps), router.matrix
        )
        logits = logits if router.bias is None else logits + router.bias
        ids, _ = self.kernels.choose(logits, router.choice_bias, self.experts(number).router.choice)
        self.store.prefetch(at, ids.t().flatten().cpu().tolist())  # every token's top choice first

    def run(self, number: int, acquired: ExpertStep, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' weighted sum, between `acquire` and here."""
        with acquired:
            return acquired.run(x, weights, self.experts(number).activation.limit, self.extras(number))


class DecoderEager(Eager):
    """`DecoderOperations` on tensors, computed at once; a context that leaves nothing claimed."""

    def __init__(self, parts: DecoderParts, batch: Batch, cache: DecoderCache, trace: Trace) -> None:
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in batch.segments])
        rotation = Rotation.at(parts.kernels, positions, parts.weights.frequencies).times(parts.turn_factor)
        head_dim = parts.description.layers[0].attention.head_dim
        super().__init__(parts.kernels, batch.segments, rotation, head_dim, cache.extend)
        self._parts = parts
        self._trace = trace
        self._acquired: ExpertStep | None = None

    def __enter__(self) -> DecoderEager:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._acquired is not None:
            self._acquired.__exit__(*raised)

    def prefetch(self, number: int, x: torch.Tensor, y: torch.Tensor | None) -> None:
        self._parts.prefetch(number, x, y)

    def acquire(self, number: int, ids: torch.Tensor) -> None:
        self._acquired = self._parts.store.acquire(self._parts.store_layer(number), ids.cpu())

    def experts(self, number: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert self._acquired is not None
        return self._parts.run(number, self._acquired, x, weights)

    def trace(self, name: str, value: torch.Tensor) -> None:
        self._trace.add(name, value)


class DecoderRecorded(Recorded):
    """`DecoderOperations` noted by a recorder, for steps with `cache`."""

    def __init__(self, parts: DecoderParts, recorder: Recorder, cache: DecoderCache) -> None:
        places = [KvPlace(*cache.layer(number)) for number in range(len(parts.weights.layers))]
        super().__init__(recorder, parts.weights.frequencies, parts.turn_factor, places)
        self._parts = parts
        self._experts: RecordedExperts | None = None
        if parts.description.experts is not None:
            limit = parts.description.experts.activation.limit
            self._experts = RecordedExperts(recorder, parts.store, limit)
        self.program: Program | None = None

    def finish(self, source: Buffer, result: Buffer) -> None:
        """Make the program, from embedded tokens to logits."""
        self.program = self._recorder.finish(source, result)

    def run(self, batch: Batch, embedded: torch.Tensor) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[n, vocab_size]`; the batch's tokens embedded, `[rows, hidden]`."""
        program, experts = self.program, self._experts
        assert program is not None
        program.source[: len(embedded)] = embedded
        slots, starts = [s.slot for s in batch.segments], [s.start for s in batch.segments]
        if experts is None:
            program.run(slots, starts)
            return program.logits(batch.logit_rows)
        experts.begin(program)
        try:
            program.run(slots, starts)
        except BaseException:
            experts.fail()
            raise
        experts.end(len(embedded))
        return program.logits(batch.logit_rows)

    def prefetch(self, number: int, x: Buffer, y: Buffer | None) -> None:
        if self._experts is None or self._parts.store.is_still:
            return
        router = self._parts.router(number)
        x = x if y is None else self.add(x, y)
        x = self.norm(x, self._parts.weights.layers[number].ffn_norm, self._parts.description.eps)
        (logits,) = self.linears(x, router.matrix)
        logits = logits if router.bias is None else self.add_bias(logits, router.bias)
        ids, _ = self.choose(logits, router.choice_bias, self._parts.experts(number).router.choice)
        self._experts.prefetch(self._parts.store_layer(number), ids)

    def acquire(self, number: int, ids: Buffer) -> None:
        assert self._experts is not None
        self._experts.acquire(self._parts.store_layer(number), ids)

    def experts(self, number: int, x: Buffer, ids: Buffer, weights: Buffer) -> Buffer:
        assert self._experts is not None
        layer, extras = self._parts.store_layer(number), self._parts.extras(number)
        return self._experts.run(layer, x, ids, weights, extras)

    def trace(self, name: str, value: Buffer) -> None:
        """Nothing is kept: a step that is traced is not replayed."""
