"""Layer operations other than products with weights, in C++: bit-identical in every batch.

Each value is computed in an order of operations that depends on its own row alone, not on the number of rows,
their alignment in memory or the number of threads. Among equal scores the first column wins.
"""

from __future__ import annotations

import ctypes

import torch

from quant.kernels.cpu.native_attention import NativeAttention
from quant.kernels.cpu.native_calls import floats
from quant.kernels.cpu.native_delta_net import NativeDeltaNet
from quant.kernels.layers import RoutingRule

SCORES = ("sqrt softplus", "softmax", "sigmoid", "chosen softmax")  # in the order of `Score` in layers.hpp


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


class NativeLayers(NativeAttention, NativeDeltaNet):
    """`LayerOperations` in C++."""

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

    def rotate(self, x: torch.Tensor, turns: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        x, turns = floats(x), turns.contiguous()
        tokens, pairs = turns.shape
        dim = x.shape[-1]
        out = x if in_place else torch.empty_like(x)
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
