"""Routed experts as a forward sees them, and their eager form on top of the expert store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from engine.layers.operations import Value
from memory.experts.step import ExpertStep
from memory.experts.store import ExpertStore
from memory.experts.streamed_step import StreamedStep
from quant.kernels.interface import NO_EXTRAS, ExpertExtras


class RoutedExperts(Protocol[Value]):
    """The routed experts of all layers; ids and weights are `[rows, top_k]`. Layers are numbered as the store
    counts them."""

    def wants_guesses(self, layer: int) -> bool:
        """Whether it can help to predict this layer's experts."""
        ...

    def prefetch(self, layer: int, ids: Value) -> None:
        """Prefetch what was predicted for a layer: each row's likeliest expert first."""
        ...

    def acquire(self, layer: int, ids: Value) -> None:
        """Begin a layer: what is missing is on its way from now on."""
        ...

    def run(
        self, layer: int, x: Value, ids: Value, weights: Value, extras: ExpertExtras = NO_EXTRAS
    ) -> Value:
        """The weighted sum of the chosen experts' outputs: x `[rows, hidden]` to the same."""
        ...


class EagerExperts:
    """`RoutedExperts` computed at once. A context: what it has acquired is released at the end.

    limit   of the activation: see `MoeCall.swiglu_limit`
    tokens  that each layer will compute
    """

    def __init__(self, store: ExpertStore, limit: float, tokens: Sequence[int], top_k: int) -> None:
        self._store = store
        self._limit = limit
        self._tokens, self._top_k = tokens, top_k
        self._acquired: ExpertStep | StreamedStep | None = None

    def __enter__(self) -> EagerExperts:
        self._store.begin(self._tokens, self._top_k)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._acquired is not None:
            self._acquired.__exit__(*raised)
        self._store.end()

    def wants_guesses(self, layer: int) -> bool:
        return self._store.wants_guesses(layer)

    def prefetch(self, layer: int, ids: torch.Tensor) -> None:
        self._store.prefetch(layer, ids.t().flatten().cpu().tolist())

    def acquire(self, layer: int, ids: torch.Tensor) -> None:
        ids = ids.cpu()
        self._acquired = self._store.stream(layer, ids) or self._store.acquire(layer, ids)

    def run(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        extras: ExpertExtras = NO_EXTRAS,
    ) -> torch.Tensor:
        assert self._acquired is not None
        with self._acquired as acquired:
            return acquired.run(x, weights, self._limit, extras)
