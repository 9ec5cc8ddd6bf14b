"""Gated DeltaNet: its weights, and what it does to the tokens of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.families.decoder.description import DeltaNet
from engine.layers.operations import Operations, Value
from quant.kernels.interface import Weight
from quant.kernels.layers import DeltaRule


@dataclass(frozen=True)
class DeltaNetWeights:
    """One layer's.

    qkv        to all queries, keys and values: `[channels, hidden]`
    z          to the gates of the output: `[value_width, hidden]`
    b, a       to what is written, and to the decay: `[value_heads, hidden]`
    conv       `[taps, channels]`, the last row of the token itself
    rates, biases  of the decay, `[value_heads]`
    norm       of a head's output, `[value_dim]`
    out        `[hidden, value_width]`
    """

    qkv: Weight
    z: Weight
    b: Weight
    a: Weight
    conv: torch.Tensor
    rates: torch.Tensor
    biases: torch.Tensor
    norm: torch.Tensor
    out: Weight


class Reader(Protocol):
    """Reads a layer's tensors by role."""

    def matrix(self, role: str) -> Weight:
        """A matrix in the kernels' layout."""
        ...

    def matrices(self, role: str, *orders: torch.Tensor) -> list[Weight]:
        """Matrices of some rows each of one matrix."""
        ...

    def floats(self, role: str) -> torch.Tensor:
        """Plain values, float32."""
        ...


def read_delta_net(read: Reader, a: DeltaNet) -> DeltaNetWeights:
    """A layer's weights. Raises FormatError where rows that share a scale would have to part."""
    if a.is_grouped:
        qkv_rows, z_rows, b_rows, a_rows = _grouped_rows(a)
        qkv, z = read.matrices("in_qkvz", qkv_rows, z_rows)
        of_b, of_a = read.matrices("in_ba", b_rows, a_rows)
    else:
        qkv, z, of_b, of_a = (read.matrix(role) for role in ("in_qkv", "in_z", "in_b", "in_a"))
    return DeltaNetWeights(
        qkv=qkv,
        z=z,
        b=of_b,
        a=of_a,
        conv=read.floats("conv").view(a.channels, a.taps).t().contiguous(),
        rates=-read.floats("decay_rate").exp(),
        biases=read.floats("decay_bias"),
        norm=read.floats("delta_norm"),
        out=read.matrix("delta_out"),
    )


def delta_net(
    ops: Operations[Value], number: int, a: DeltaNet, w: DeltaNetWeights, x: Value, eps: float
) -> Value:
    """Layer `number` of normed x `[tokens, hidden]`, to the same."""
    qkv, z, of_b, of_a = ops.linears(x, w.qkv, w.z, w.b, w.a)
    qkv = ops.convolve(number, qkv, w.conv)
    heads = ops.delta_rule(number, qkv, of_a, of_b, DeltaRule(a.key_heads, w.rates, w.biases))
    heads = ops.norm_heads(heads, w.norm, eps)  # [tokens, value_width]
    (out,) = ops.linears(ops.gated(z, heads, float("inf")), w.out)
    return out


def _grouped_rows(a: DeltaNet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where rows lie of queries, keys and values; of gates; of shares; of decays: each in heads' order."""
    served = a.value_heads // a.key_heads
    sizes = [a.key_dim, a.key_dim, served * a.value_dim, served * a.value_dim]
    rows = torch.arange(a.key_heads * sum(sizes)).view(a.key_heads, -1)
    q, k, v, z = (part.flatten() for part in torch.split(rows, sizes, dim=1))
    shares, decays = torch.arange(2 * a.value_heads).view(a.key_heads, 2, served).unbind(1)
    return torch.cat((q, k, v)), z, shares.flatten(), decays.flatten()
