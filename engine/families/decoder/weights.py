"""The weights of a decoder. Matrices are as stored; norms and biases (a few values per layer) float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.families.decoder.delta_net import DeltaNetWeights
from engine.families.decoder.stored import RowsInFile
from engine.families.places import DensePlaces
from memory.experts.store import ExpertStore
from quant.kernels.interface import ExpertBiases, Weight


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention; None where it has no such weight."""

    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    o_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    sinks: torch.Tensor | None
    gate: Weight | None


@dataclass(frozen=True)
class IndexerWeights:
    """One layer's indexer.

    q, k     of the queries' latent, and of the hidden state
    weights  of each head, of the hidden state
    """

    q: Weight
    k: Weight
    k_norm: torch.Tensor
    k_bias: torch.Tensor
    weights: Weight


@dataclass(frozen=True)
class MlaWeights:
    """One layer's latent attention; None where queries have no latent, and where it has no indexer.

    q         of the queries' latent, or of the hidden state
    to_latent, from_latent  of each head: queries into the latent's space `[heads, rank, plain_dim]`, values
              out of it `[heads, value_dim, rank]`, plain numbers
    """

    q_a: Weight | None
    q_a_norm: torch.Tensor | None
    q: Weight
    kv_a: Weight
    kv_a_norm: torch.Tensor
    to_latent: torch.Tensor
    from_latent: torch.Tensor
    o: Weight
    indexer: IndexerWeights | None


@dataclass(frozen=True)
class MlpWeights:
    """A gated feed-forward network."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True)
class RouterWeights:
    """A router, biases of its experts, and the network that every token uses beside them."""

    matrix: Weight
    bias: torch.Tensor | None
    choice_bias: torch.Tensor | None
    expert_biases: ExpertBiases | None
    shared: MlpWeights | None
    shared_share: Weight | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer; of its routed experts only the router."""

    attn_norm: torch.Tensor
    attention: AttentionWeights | MlaWeights | DeltaNetWeights
    ffn_norm: torch.Tensor
    feed_forward: MlpWeights | RouterWeights

    @property
    def device(self) -> torch.device:
        """The device of these weights, where the layer is computed."""
        return self.attn_norm.device


@dataclass(frozen=True)
class DecoderWeights:
    """The whole model.

    embed        in its file where DRAM has no room for it
    frequencies  radians per position of each rotary pair, `[pairs]` float64
    experts      None where no layer has any
    """

    embed: Weight | RowsInFile
    norm: torch.Tensor
    head: Weight
    layers: tuple[LayerWeights, ...]
    frequencies: torch.Tensor
    experts: ExpertStore | None
    places: DensePlaces
