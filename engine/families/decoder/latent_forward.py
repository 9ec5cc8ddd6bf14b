"""Latent attention of a decoder's layers, over all tokens or over those that an indexer chooses."""

from __future__ import annotations

import math
from typing import Generic

from engine.families.base import Trace
from engine.families.decoder.description import Indexer, Mla
from engine.families.decoder.indexer import queries_and_keys
from engine.families.decoder.weights import IndexerWeights, MlaWeights
from engine.layers.operations import Operations, Value


class LatentAttention(Generic[Value]):
    """Layers one after the other: what an indexer has chosen holds until the next one.

    trace  gets what each indexer chooses, as `index_selected.{layer}`
    """

    def __init__(self, ops: Operations[Value], trace: Trace) -> None:
        self._ops = ops
        self._trace = trace
        self._chosen: Value | None = None

    def attend(self, number: int, a: Mla, w: MlaWeights, x: Value) -> Value:
        """Attention of layer `number`: normed x `[tokens, hidden]` to the same."""
        ops = self._ops
        if w.q_a is None or w.q_a_norm is None:
            q, kv = ops.linears(x, w.q, w.kv_a)
        else:
            of_queries, kv = ops.linears(x, w.q_a, w.kv_a)
            of_queries = ops.norm(of_queries, w.q_a_norm, a.eps)
            (q,) = ops.linears(of_queries, w.q)
            if a.indexer is not None and w.indexer is not None:
                self._choose(number, a.indexer, w.indexer, x, of_queries)
        q = ops.scale(q, a.scale * math.sqrt(a.row_dim))  # kernels scale by its inverse
        plain = ops.batched_linear(
            ops.part(q, a.heads, 0, a.plain_dim), w.to_latent
        )  # [tokens, heads * rank]
        turned = ops.rotate(ops.part(q, a.heads, a.plain_dim, a.rope.dims), a.heads)
        latent = ops.norm(ops.part(kv, 1, 0, a.rank), w.kv_a_norm, a.eps)
        shared = ops.rotate(ops.part(kv, 1, a.rank, a.rope.dims), 1)
        queries, keys = ops.join(plain, turned, a.heads), ops.join(latent, shared, 1)
        if a.indexer is None:
            seen = ops.attend(number, queries, keys, None)  # [tokens, heads * rank]
        else:
            assert self._chosen is not None
            seen = ops.attend_chosen(number, queries, keys, self._chosen)
        (out,) = ops.linears(ops.batched_linear(seen, w.from_latent), w.o)
        return out

    def _choose(self, number: int, a: Indexer, w: IndexerWeights, x: Value, of_queries: Value) -> None:
        queries, weights, keys = queries_and_keys(self._ops, a, w, x, of_queries)
        self._chosen = self._ops.choose(number, queries, weights, keys, a.top_k)
        self._trace.add(f"index_selected.{number}", self._chosen)
