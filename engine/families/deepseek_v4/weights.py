"""The weights of a DeepSeek-V4 model, read from a verified checkpoint within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.families.deepseek_v4.config import INDEXED, V4Config
from engine.families.deepseek_v4.shape import loaded_shape
from engine.families.expert_store import expert_store
from engine.families.places import place
from engine.families.streams.experts import StreamExpertFiles
from engine.families.streams.reader import Reader
from engine.families.streams.weights import StreamLayer, StreamWeights
from engine.layers.hyper_connections import ReadMix
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.budget import MemoryBudget
from quant.errors import CheckpointError
from quant.kernels.interface import Kernels, Weight


@dataclass(frozen=True)
class Compressor:
    """What makes entries of one kind; ape `[ratio, width]` is added to the gates of a group's tokens."""

    wkv: Weight
    wgate: Weight
    ape: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True)
class LayerWeights(StreamLayer):
    """And what V4 alone has.

    head_norm         ones, by which each query head is normalised
    compressor        where the layer sees entries
    index_compressor  where it chooses among them: makes the keys that it chooses by
    gate_bias         for the choice of experts; None where token ids choose
    token_experts     `[vocab, top_k]` int64, in host memory: the experts that each token id chooses, or None
    """

    head_norm: torch.Tensor
    compressor: Compressor | None
    index_compressor: Compressor | None
    gate_bias: torch.Tensor | None
    token_experts: torch.Tensor | None


@dataclass(frozen=True)
class V4Weights(StreamWeights):
    """The whole model."""

    hc_head: ReadMix
    layers: tuple[LayerWeights, ...]


def read_weights(c: V4Config, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> V4Weights:
    """All weights of a checkpoint that `Checkpoint.verify` has accepted.

    All goes to where the plan places it, dense weights in the layout of the kernels there. Raises BudgetError
    where not even the dense weights fit.
    """
    shape = loaded_shape(c, checkpoint, checkpoint.path.name, budget.kv_format)
    places = place(shape, checkpoint.path, budget)
    host = Reader(checkpoint, kernels)
    by_head = Reader(checkpoint, kernels, places.head)
    tables = [_token_experts(c, host, n) for n in range(c.layers)]
    files = StreamExpertFiles.of(c, checkpoint, c.layers)
    return V4Weights(
        embed=host.plain("embed.weight") if places.holds_embedding else host.on_disk("embed.weight"),
        hc_head=read_head_mix(c, by_head, "hc_head"),
        norm=by_head.small("norm.weight"),
        head=by_head.plain("head.weight"),
        layers=tuple(
            read_layer(c, Reader(checkpoint, kernels, device), n, tables[n])
            for n, device in enumerate(places.layers)
        ),
        experts=expert_store(files, checkpoint.path, kernels, budget, places),
        places=places,
    )


def read_head_mix(c: V4Config, reader: Reader, name: str) -> ReadMix:
    """How streams are read for the head."""
    return ReadMix(
        reader.small(f"{name}_fn"),
        reader.small(f"{name}_base"),
        reader.small(f"{name}_scale").expand(c.hc_mult).contiguous(),
        c.hc_eps,
        c.rms_norm_eps,
    )


def _token_experts(c: V4Config, reader: Reader, n: int) -> torch.Tensor | None:
    """The table of a layer whose experts token ids choose. Raises CheckpointError where it names others."""
    if n >= c.hashed_layers:
        return None
    name = f"layers.{n}.ffn.gate.tid2eid"
    table = reader.checkpoint.read(name).view(torch.int64).view(c.vocab_size, c.num_experts_per_tok)
    least, most = (int(edge) for edge in table.aminmax())
    if least < 0 or most >= c.n_routed_experts:
        raise CheckpointError(
            f"{reader.checkpoint.path}: {name} names experts {least} to {most} of {c.n_routed_experts}; the "
            "file is damaged, download it again"
        )
    return table


def read_layer(c: V4Config, reader: Reader, n: int, token_experts: torch.Tensor | None) -> LayerWeights:
    """One layer, its tensors named `layers.N`."""
    layer = f"layers.{n}"
    attn, is_indexed = f"{layer}.attn", c.ratios[n] == INDEXED
    return LayerWeights(
        attn_norm=reader.small(f"{layer}.attn_norm.weight"),
        ffn_norm=reader.small(f"{layer}.ffn_norm.weight"),
        hc_attn=reader.connection(c, f"{layer}.hc_attn"),
        hc_ffn=reader.connection(c, f"{layer}.hc_ffn"),
        attn=reader.attention(c, attn),
        head_norm=torch.ones(c.head_dim, device=reader.device),
        compressor=_read_compressor(reader, f"{attn}.compressor") if c.ratios[n] else None,
        indexer=reader.indexer(c, attn) if is_indexed else None,
        index_compressor=_read_compressor(reader, f"{attn}.indexer.compressor") if is_indexed else None,
        gate=reader.plain(f"{layer}.ffn.gate.weight"),
        gate_bias=reader.small(f"{layer}.ffn.gate.bias") if token_experts is None else None,
        token_experts=token_experts,
        shared_experts=reader.shared_expert(c, layer),
    )


def _read_compressor(reader: Reader, name: str) -> Compressor:
    return Compressor(
        reader.plain(f"{name}.wkv.weight"),
        reader.plain(f"{name}.wgate.weight"),
        reader.small(f"{name}.ape"),
        reader.small(f"{name}.norm.weight"),
    )
