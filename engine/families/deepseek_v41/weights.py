"""The weights of a DeepSeek-V4.1 model, read from a verified checkpoint within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.shape import loaded_shape
from engine.families.expert_store import expert_store, gpus_left, trace_path
from engine.families.places import place
from engine.families.streams.experts import StreamExpertFiles
from engine.families.streams.reader import Reader
from engine.families.streams.weights import StreamLayer, StreamWeights
from engine.layers.engram import EngramMix
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.reads import RowsOnDisk
from memory.engram.store import EngramStore, TableFiles
from memory.planner.budget import MemoryBudget
from memory.telemetry import Telemetry
from quant.formats.quantization_config import Role
from quant.kernels.interface import Kernels, Weight


@dataclass(frozen=True)
class CompressorWeights:
    """What a kv source layer needs to make compressed entries; wgate only where its ratio is over 1."""

    wkv: Weight
    wgate: Weight | None
    norm: torch.Tensor
    index_wk: Weight
    index_norm: torch.Tensor


@dataclass(frozen=True)
class LayerWeights(StreamLayer):
    """And what V4.1 alone has; a compressor in kv source layers, Engram in some."""

    compressor: CompressorWeights | None
    gate_bias: torch.Tensor
    engram: EngramMix | None


@dataclass(frozen=True)
class V41Weights(StreamWeights):
    """The whole model."""

    layers: tuple[LayerWeights, ...]
    engram: EngramStore


def read_weights(
    config: V41Config, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget
) -> V41Weights:
    """All weights of a checkpoint that `Checkpoint.verify` has accepted.

    All goes to where the plan places it, dense weights in the layout of the kernels there. Raises BudgetError
    where not even the dense weights fit.
    """
    shape = loaded_shape(config, checkpoint, checkpoint.path.name, budget.kv_format)
    places = place(shape, checkpoint.path, budget)
    host = Reader(checkpoint, kernels)
    telemetry = Telemetry()
    tables = {n: _table_files(config, host, n) for n in config.engram_layer_ids}
    gpus = gpus_left(places, budget)
    by_head = Reader(checkpoint, kernels, places.head)
    none = torch.empty(0, config.hidden_size)  # of another part
    embed: torch.Tensor | RowsOnDisk = none
    if config.is_first:
        embed = host.plain("embed.weight") if places.holds_embedding else host.on_disk("embed.weight")
    return V41Weights(
        embed=embed,
        norm=by_head.small("norm.weight") if config.is_last else none[:, 0].to(places.head),
        head=by_head.plain("head.weight") if config.is_last else none,
        layers=tuple(
            read_layer(config, Reader(checkpoint, kernels, device), n)
            for n, device in enumerate(places.layers)
        ),
        experts=expert_store(
            StreamExpertFiles.of(config, checkpoint, config.num_hidden_layers),
            trace_path(checkpoint),
            kernels,
            budget,
            places,
            telemetry=telemetry,
        ),
        engram=EngramStore(
            tables,
            checkpoint,
            kernels,
            places.placement.tables,
            telemetry,
            gpus={layer: gpu for layer, tier in enumerate(places.tiers) for gpu in gpus if gpu.name == tier},
        ),
        places=places,
    )


def _table_files(c: V41Config, reader: Reader, n: int) -> TableFiles:
    name = f"layers.{n}.engram.embed"
    entries = reader.checkpoint.entries
    format_ = reader.formats.packed(Role.ENGRAM, name)
    return TableFiles(entries[f"{name}.weight"], entries[f"{name}.scale"], format_, c.engram_head_dim)


def read_layer(c: V41Config, reader: Reader, n: int) -> LayerWeights:
    """One layer, its tensors named `layers.N`."""
    layer = f"layers.{n}"
    engram = None
    if n in c.engram_layer_ids:
        qk = reader.small(f"{layer}.engram.q_weight") * reader.small(f"{layer}.engram.k_weight")
        columns = (c.engram_max_ngram_size - 1) * c.engram_n_heads * c.engram_head_dim
        wkv = reader.dense(f"{layer}.engram.wkv", c.hidden_size * (c.hc_mult + 1), columns)
        engram = EngramMix(wkv, qk, c.rms_norm_eps)
    return LayerWeights(
        attn_norm=reader.small(f"{layer}.attn_norm.weight"),
        ffn_norm=reader.small(f"{layer}.ffn_norm.weight"),
        hc_attn=reader.connection(c, f"{layer}.hc_attn"),
        hc_ffn=reader.connection(c, f"{layer}.hc_ffn"),
        attn=reader.attention(c, f"{layer}.attn"),
        compressor=_read_compressor(c, reader, n) if n in c.kv_source_layer_ids else None,
        indexer=reader.indexer(c, f"{layer}.attn") if n in c.index_source_layer_ids else None,
        gate=reader.plain(f"{layer}.ffn.gate.weight"),
        gate_bias=reader.small(f"{layer}.ffn.gate.bias"),
        shared_experts=reader.shared_expert(c, layer),
        engram=engram,
    )


def _read_compressor(c: V41Config, reader: Reader, n: int) -> CompressorWeights:
    attn, gated = f"layers.{n}.attn", c.compress_ratios[n] > 1
    return CompressorWeights(
        wkv=reader.plain(f"{attn}.compressor.wkv.weight"),
        wgate=reader.plain(f"{attn}.compressor.wgate.weight") if gated else None,
        norm=reader.small(f"{attn}.compressor.norm.weight"),
        index_wk=reader.plain(f"{attn}.indexer.wk.weight"),
        index_norm=reader.small(f"{attn}.indexer.k_norm.weight"),
    )
