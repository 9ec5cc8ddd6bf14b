"""The weights that V4 and V4.1 have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.families.places import DensePlaces
from engine.layers.hyper_connections import HyperConnection
from memory.checkpoint.reads import RowsOnDisk
from memory.experts.store import ExpertStore
from quant.kernels.interface import Weight


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token uses; dense weights, so packed or plain."""

    w1: Weight
    w3: Weight
    w2: Weight


@dataclass(frozen=True)
class StreamAttention:
    """What attention has in every layer; wo_a holds one `[o_lora_rank, heads * head_dim / groups]` weight per
    group."""

    wq_a: Weight
    q_norm: torch.Tensor
    wq_b: Weight
    wkv: Weight
    kv_norm: torch.Tensor
    sink: torch.Tensor
    wo_a: tuple[Weight, ...]
    wo_b: Weight


@dataclass(frozen=True)
class StreamIndexer:
    """What chooses among entries asks with."""

    wq_b: Weight
    weights: Weight


@dataclass(frozen=True)
class StreamLayer:
    """One layer: attention, feed-forward, and the connections around both.

    indexer  where the layer chooses among entries
    """

    attn_norm: torch.Tensor
    ffn_norm: torch.Tensor
    hc_attn: HyperConnection
    hc_ffn: HyperConnection
    attn: StreamAttention
    indexer: StreamIndexer | None
    gate: Weight
    shared_experts: SharedExpert

    @property
    def device(self) -> torch.device:
        """The device of these weights, where the layer is computed."""
        return self.attn_norm.device


@dataclass(frozen=True)
class StreamWeights:
    """The whole model."""

    embed: torch.Tensor | RowsOnDisk
    norm: torch.Tensor
    head: Weight
    layers: tuple[StreamLayer, ...]
    experts: ExpertStore
    places: DensePlaces
