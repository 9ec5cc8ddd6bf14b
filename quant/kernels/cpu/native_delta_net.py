"""Gated DeltaNet in C++: convolutions and states, token by token."""

from __future__ import annotations

import ctypes

import torch

from quant.kernels.cpu.native_calls import NativeCalls, floats
from quant.kernels.layers import DeltaRule


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


def _changed(state: torch.Tensor) -> int:
    """Where a state lies that is changed in place."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError("a state must be contiguous float32")
    return state.data_ptr()


class NativeDeltaNet(NativeCalls):
    """The part of `LayerOperations` with states that tokens change."""

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
