"""Layer operations other than products with weights, in C++: bit-identical in every batch.

Each value is computed in an order of operations that depends on its own row alone, not on the number of rows,
their alignment in memory or the number of threads. Among equal scores the first column wins.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional as F

from quant.kernels.layers import DeltaRule, RoutingRule

SCORES = ("sqrt softplus", "softmax", "sigmoid", "chosen softmax")  # in the order of `Score` in layers.hpp


class AttendCall(ctypes.Structure):
    """`Attend` of native_src/layers.hpp."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("before", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("ring", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("more", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("choices", ctypes.c_int64),
        ("sink", ctypes.c_void_p),
    )


class IndexCall(ctypes.Structure):
    """`Index` of native_src/layers.hpp."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("visible", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
    )


class ConvolveCall(ctypes.Structure):
    """`Convolve` of native_src/layers.hpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("before", ctypes.c_int64),
    )


class DeltaRuleCall(ctypes.Structure):
    """`DeltaRule` of native_src/layers.hpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rates", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("value_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("is_first", ctypes.c_int64),
    )


class Routing(ctypes.Structure):
    """`Routing` of native_src/layers.hpp."""

    _fields_ = (
        ("score", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("best", ctypes.c_int64),
        ("is_renormalised", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("factor", ctypes.c_float),
    )

    @classmethod
    def of(cls, rule: RoutingRule) -> Routing:
        """The rule as the library reads it."""
        return cls(
            SCORES.index(rule.score),
            rule.top_k,
            *(rule.groups or (0, 0, 0)),
            int(rule.is_renormalised),
            rule.epsilon,
            rule.factor,
        )


def floats(x: torch.Tensor) -> torch.Tensor:
    """x as contiguous float32: unchanged if it already is, because torch calls take time."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _changed(state: torch.Tensor) -> int:
    """Where a state lies that is changed in place."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError("a state must be contiguous float32")
    return state.data_ptr()


def fetched(compressed: torch.Tensor, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The selected entries `[chosen, dim]`, copied from another device to that of `entries`, and their new
    indices.

    entries `[L, k]`, -1 for none, which they stay.
    """
    is_chosen = entries >= 0
    latents = compressed[entries[is_chosen].to(compressed.device)].to(entries.device)
    places = torch.full_like(entries, -1)
    places[is_chosen] = torch.arange(len(latents), device=entries.device)
    return latents, places


class NativeLayers:
    """`LayerOperations` in C++; what implements it knows the library, a level and a number of threads."""

    _library: ctypes.CDLL
    _level: int

    def _threads(self) -> int:
        raise NotImplementedError

    def gated(
        self, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, shift: float = 0.0
    ) -> torch.Tensor:
        gate, up = floats(gate), floats(up)
        out = torch.empty_like(gate)
        self._library.loci_gated(
            self._level,
            self._threads(),
            gate.data_ptr(),
            up.data_ptr(),
            limit,
            alpha,
            shift,
            gate.numel(),
            out.data_ptr(),
        )
        return out

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        x = floats(x)
        out = torch.empty_like(x)
        self._library.loci_sigmoid(self._level, self._threads(), x.data_ptr(), x.numel(), out.data_ptr())
        return out

    def weighted_sum(self, parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        parts, weights = floats(parts), floats(weights)
        tokens, n, dim = parts.shape
        out = parts.new_empty(tokens, dim)
        self._library.loci_weighted_sum(
            self._level,
            self._threads(),
            parts.data_ptr(),
            weights.data_ptr(),
            tokens,
            n,
            dim,
            out.data_ptr(),
        )
        return out

    def mix_streams(
        self, streams: torch.Tensor, y: torch.Tensor, post: torch.Tensor, combine: torch.Tensor
    ) -> torch.Tensor:
        streams, y, post, combine = floats(streams), floats(y), floats(post), floats(combine)
        out = torch.empty_like(streams)
        self._library.loci_mix_streams(
            self._level,
            self._threads(),
            streams.data_ptr(),
            y.data_ptr(),
            post.data_ptr(),
            combine.data_ptr(),
            *streams.shape,
            out.data_ptr(),
        )
        return out

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        positions, frequencies = positions.contiguous(), frequencies.contiguous()
        out = torch.empty(len(positions), len(frequencies), dtype=torch.complex64)
        self._library.loci_turns(positions.data_ptr(), frequencies.data_ptr(), *out.shape, out.data_ptr())
        return out

    def rotate(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        x, turns = floats(x), turns.contiguous()
        tokens, pairs = turns.shape
        dim = x.shape[-1]
        out = torch.empty_like(x)
        self._library.loci_rotate(
            self._level,
            self._threads(),
            x.data_ptr(),
            turns.data_ptr(),
            tokens,
            x.numel() // (tokens * dim) if tokens else 0,
            dim,
            pairs,
            out.data_ptr(),
        )
        return out

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, bias = floats(logits), None if bias is None else floats(bias)
        tokens, experts = logits.shape
        chosen = torch.empty((tokens, rule.top_k), dtype=torch.int64)
        weights = logits.new_empty(tokens, rule.top_k)
        self._library.loci_route(
            self._threads(),
            logits.data_ptr(),
            None if bias is None else bias.data_ptr(),
            tokens,
            experts,
            ctypes.byref(Routing.of(rule)),
            chosen.data_ptr(),
            weights.data_ptr(),
        )
        return chosen, weights

    def weigh(self, logits: torch.Tensor, chosen: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
        logits, chosen = floats(logits), chosen.contiguous()
        tokens, experts = logits.shape
        weights = logits.new_empty(tokens, rule.top_k)
        self._library.loci_weigh(
            self._threads(),
            logits.data_ptr(),
            chosen.data_ptr(),
            tokens,
            experts,
            ctypes.byref(Routing.of(rule)),
            weights.data_ptr(),
        )
        return weights

    def pool_groups(self, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        rows, gates = floats(rows), floats(gates)
        groups, n, dim = rows.shape
        out = rows.new_empty(groups, dim)
        self._library.loci_pool_groups(
            self._level,
            self._threads(),
            rows.data_ptr(),
            gates.data_ptr(),
            groups,
            n,
            dim,
            out.data_ptr(),
        )
        return out

    def engram_gates(
        self, streams: torch.Tensor, qk: torch.Tensor, keys: torch.Tensor, eps: float
    ) -> torch.Tensor:
        streams, qk = floats(streams), floats(qk)
        tokens, n, dim = streams.shape
        if keys.dtype != torch.float32 or keys.stride()[1:] != (
            dim,
            1,
        ):  # a part of longer rows is taken as it is
            keys = floats(keys)
        gates = streams.new_empty(tokens, n)
        self._library.loci_engram_gates(
            self._level,
            self._threads(),
            streams.data_ptr(),
            qk.data_ptr(),
            keys.data_ptr(),
            keys.stride(0),
            tokens,
            n,
            dim,
            eps,
            gates.data_ptr(),
        )
        return gates

    def index_scores(
        self,
        queries: torch.Tensor,
        weights: torch.Tensor,
        keys: torch.Tensor,
        visible: torch.Tensor,
        entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries, weights, keys, visible = floats(queries), floats(weights), floats(keys), visible.contiguous()
        if entries is not None:
            entries = entries.contiguous()
        columns = keys.shape[0] if entries is None else entries.shape[1]
        scores = queries.new_empty(queries.shape[0], columns)
        call = IndexCall(
            queries.data_ptr(),
            weights.data_ptr(),
            keys.data_ptr(),
            *queries.shape,
            visible.data_ptr(),
            0 if entries is None else entries.data_ptr(),
            columns,
        )
        self._library.loci_index_scores(self._level, self._threads(), ctypes.byref(call), scores.data_ptr())
        return scores

    def best_columns(self, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        scores = floats(scores)
        rows, columns = scores.shape
        best = torch.empty((rows, min(top_k, columns)), dtype=torch.int64)
        self._library.loci_best_columns(
            self._threads(), scores.data_ptr(), rows, columns, best.shape[1], best.data_ptr()
        )
        return best

    def convolve(
        self, x: torch.Tensor, weights: torch.Tensor, tail: torch.Tensor, before: int
    ) -> torch.Tensor:
        x, weights = floats(x), floats(weights)
        out = torch.empty_like(x)
        call = ConvolveCall(x.data_ptr(), weights.data_ptr(), _changed(tail), *x.shape, len(weights), before)
        self._library.loci_convolve(self._level, self._threads(), ctypes.byref(call), out.data_ptr())
        return out

    def delta_rule(
        self,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        rule: DeltaRule,
        state: torch.Tensor,
        *,
        is_first: bool,
    ) -> torch.Tensor:
        x, a, b, rates, biases = map(floats, (x, a, b, rule.rates, rule.biases))
        heads, key_dim, value_dim = state.shape
        out = x.new_empty(len(x), heads * value_dim)
        call = DeltaRuleCall(
            *(part.data_ptr() for part in (x, a, b, rates, biases)),
            _changed(state),
            len(x),
            rule.key_heads,
            heads,
            key_dim,
            value_dim,
            int(is_first),
        )
        self._library.loci_delta_rule(self._level, self._threads(), ctypes.byref(call), out.data_ptr())
        return out

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sinks = None if sinks is None else floats(sinks)
        return self._attend(q, keys, values, window or keys.shape[1], sinks, None, None)

    def attend_chosen(
        self, q: torch.Tensor, rows: torch.Tensor, chosen: torch.Tensor, value_dim: int
    ) -> torch.Tensor:
        q, rows, chosen = floats(q), floats(rows), chosen.contiguous()
        tokens, heads, dim = q.shape
        out = q.new_empty(tokens, heads, value_dim)
        call = AttendCall(
            q=q.data_ptr(),
            tokens=tokens,
            heads=heads,
            kv_heads=1,
            dim=dim,
            value_dim=value_dim,
            more=rows.data_ptr(),
            chosen=chosen.data_ptr(),
            choices=chosen.shape[1],
        )
        self._library.loci_attend(self._level, self._threads(), ctypes.byref(call), out.data_ptr())
        return out

    def attend_sparse(
        self,
        q: torch.Tensor,
        window_kv: torch.Tensor,
        sink: torch.Tensor,
        window: int,
        compressed: torch.Tensor | None = None,
        entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if compressed is not None and entries is not None and compressed.device != q.device:
            compressed, entries = fetched(compressed, entries)
        kv = floats(window_kv).unsqueeze(0)
        return self._attend(q, kv, kv, window, floats(sink), compressed, entries)

    def _attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int,
        sink: torch.Tensor | None,
        compressed: torch.Tensor | None,
        entries: torch.Tensor | None,
    ) -> torch.Tensor:
        """Of the last tokens, q `[tokens, heads, dim]`; keys `[kv_heads, before + tokens, dim]`, values
        `[kv_heads, before + tokens, value_dim]`."""
        q = floats(q)
        tokens, heads, dim = q.shape
        kv_heads, end, value_dim = values.shape
        if keys.stride()[1:] != (dim, 1) or values.stride() != keys.stride():
            keys, values = floats(keys), floats(F.pad(values, (0, dim - value_dim)))
        if compressed is None or entries is None:
            more, chosen, choices = 0, 0, 0
        else:
            compressed, entries = floats(compressed), entries.contiguous()
            more, chosen, choices = compressed.data_ptr(), entries.data_ptr(), entries.shape[1]
        out = q.new_empty(tokens, heads, value_dim)
        call = AttendCall(
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tokens,
            heads,
            kv_heads,
            dim,
            value_dim,
            keys.stride(0),
            end - tokens,
            window,
            0,
            0,
            more,
            chosen,
            choices,
            0 if sink is None else sink.data_ptr(),
        )
        self._library.loci_attend(self._level, self._threads(), ctypes.byref(call), out.data_ptr())
        return out
