"""The weights of a DeepSeek-V4.1 model, read from a verified checkpoint within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.shape import checkpoint_shape
from engine.families.places import HOST, DensePlaces, place
from engine.families.streams.reader import Reader, SharedExpert, StreamExpertFiles
from engine.layers.engram import EngramMix
from engine.layers.hyper_connections import HyperConnection
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.reads import RowsOnDisk
from memory.engram.store import EngramStore, TableFiles
from memory.experts.store import ASSUMED_CPU_BYTES_PER_S, ExpertStore
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.formats.quantization_config import Role
from quant.kernels.interface import Kernels, Weight

# The share of DRAM left after dense weights that goes to hot rows of Engram tables if not everything fits.
HOT_ROWS_SHARE = 0.05
ROOM_FOR_ALIGNMENT = 1.01  # expert slots are aligned to cache lines


@dataclass(frozen=True)
class CompressorWeights:
    """What a kv source layer needs to make compressed entries; wgate only where its ratio is over 1."""

    wkv: Weight
    wgate: Weight | None
    norm: torch.Tensor
    index_wk: Weight
    index_norm: torch.Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention; wo_a holds one `[o_lora_rank, heads * head_dim / groups]` weight per group."""

    wq_a: Weight
    q_norm: torch.Tensor
    wq_b: Weight
    wkv: Weight
    kv_norm: torch.Tensor
    sink: torch.Tensor
    wo_a: tuple[Weight, ...]
    wo_b: Weight
    compressor: CompressorWeights | None
    indexer_wq_b: Weight | None
    indexer_weights: Weight | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer: attention, feed-forward, the connections around both, and Engram where it has it."""

    attn_norm: torch.Tensor
    ffn_norm: torch.Tensor
    hc_attn: HyperConnection
    hc_ffn: HyperConnection
    attn: AttentionWeights
    gate: Weight
    gate_bias: torch.Tensor
    shared_experts: SharedExpert
    engram: EngramMix | None

    @property
    def device(self) -> torch.device:
        """The device of these weights, where the layer is computed."""
        return self.attn_norm.device


@dataclass(frozen=True)
class V41Weights:
    """The whole model."""

    embed: torch.Tensor | RowsOnDisk
    norm: torch.Tensor
    head: Weight
    layers: tuple[LayerWeights, ...]
    experts: ExpertStore
    engram: EngramStore
    places: DensePlaces


def read_weights(
    config: V41Config, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget
) -> V41Weights:
    """All weights of a checkpoint that `Checkpoint.verify` has accepted.

    Dense weights are copied to where the plan places them, in the layout of the kernels there. Routed experts
    get what is left of each GPU; of DRAM they and the Engram tables do: where not everything fits, a small
    part goes to hot rows of the tables (a token needs a few kilobytes of them) and the rest to experts (it
    needs gigabytes). Raises BudgetError where not even the dense weights fit.
    """
    places = place(checkpoint_shape(config, checkpoint, checkpoint.path.name), checkpoint.path, budget)
    left = places.left["dram"]
    tables_bytes, experts_bytes = places.tables_bytes, places.experts_bytes
    everything_fits = tables_bytes + experts_bytes * ROOM_FOR_ALIGNMENT <= left
    hot_rows_bytes = tables_bytes if everything_fits else min(tables_bytes, int(left * HOT_ROWS_SHARE))
    host = Reader(checkpoint, kernels)
    telemetry = Telemetry()
    files = StreamExpertFiles(
        checkpoint,
        config.num_hidden_layers,
        config.n_routed_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        host.formats.experts,
    )
    tables = {n: _table_files(config, host, n) for n in config.engram_layer_ids}
    hotness = trace_of_checkpoint(checkpoint.path, config.num_hidden_layers, config.n_routed_experts)
    dram = Tier("dram", left - hot_rows_bytes, HOST)
    gpus = [replace(gpu, budget_bytes=places.left[gpu.name]) for gpu in budget.gpus]
    by_head = Reader(checkpoint, kernels, places.head)
    return V41Weights(
        embed=host.plain("embed.weight") if places.holds_embedding else host.on_disk("embed.weight"),
        norm=by_head.small("norm.weight"),
        head=by_head.plain("head.weight"),
        layers=tuple(
            _read_layer(config, Reader(checkpoint, kernels, device), n)
            for n, device in enumerate(places.layers)
        ),
        experts=ExpertStore(
            files,
            kernels,
            dram,
            gpus,
            telemetry=telemetry,
            hotness=hotness,
            cpu_bytes_per_s=budget.cpu_bytes_per_s or ASSUMED_CPU_BYTES_PER_S,
        ),
        engram=EngramStore(
            tables,
            checkpoint,
            kernels,
            hot_rows_bytes,
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


def _read_layer(c: V41Config, reader: Reader, n: int) -> LayerWeights:
    layer = f"layers.{n}"

    def connection(sub: str) -> HyperConnection:
        return reader.connection(
            f"{layer}.hc_{sub}",
            c.hc_mult,
            iterations=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )

    engram = None
    if n in c.engram_layer_ids:
        qk = reader.small(f"{layer}.engram.q_weight") * reader.small(f"{layer}.engram.k_weight")
        columns = (c.engram_max_ngram_size - 1) * c.engram_n_heads * c.engram_head_dim
        wkv = reader.dense(f"{layer}.engram.wkv", c.hidden_size * (c.hc_mult + 1), columns)
        engram = EngramMix(wkv, qk, c.rms_norm_eps)
    width = c.moe_intermediate_size * c.n_shared_experts
    return LayerWeights(
        attn_norm=reader.small(f"{layer}.attn_norm.weight"),
        ffn_norm=reader.small(f"{layer}.ffn_norm.weight"),
        hc_attn=connection("attn"),
        hc_ffn=connection("ffn"),
        attn=_read_attention(c, reader, n),
        gate=reader.plain(f"{layer}.ffn.gate.weight"),
        gate_bias=reader.small(f"{layer}.ffn.gate.bias"),
        shared_experts=reader.shared_expert(f"{layer}.ffn.shared_experts", width, c.hidden_size),
        engram=engram,
    )


def _read_attention(c: V41Config, reader: Reader, n: int) -> AttentionWeights:
    attn = f"layers.{n}.attn"
    compressor = None
    if n in c.kv_source_layer_ids:
        gated = c.compress_ratios[n] > 1
        compressor = CompressorWeights(
            wkv=reader.plain(f"{attn}.compressor.wkv.weight"),
            wgate=reader.plain(f"{attn}.compressor.wgate.weight") if gated else None,
            norm=reader.small(f"{attn}.compressor.norm.weight"),
            index_wk=reader.plain(f"{attn}.indexer.wk.weight"),
            index_norm=reader.small(f"{attn}.indexer.k_norm.weight"),
        )
    indexed = n in c.index_source_layer_ids
    query_dim = c.num_attention_heads * c.head_dim
    index_dim = c.index_n_heads * c.index_head_dim
    return AttentionWeights(
        wq_a=reader.dense(f"{attn}.wq_a", c.q_lora_rank, c.hidden_size),
        q_norm=reader.small(f"{attn}.q_norm.weight"),
        wq_b=reader.dense(f"{attn}.wq_b", query_dim, c.q_lora_rank),
        wkv=reader.dense(f"{attn}.wkv", c.head_dim, c.hidden_size),
        kv_norm=reader.small(f"{attn}.kv_norm.weight"),
        sink=reader.small(f"{attn}.attn_sink"),
        wo_a=reader.dense_groups(f"{attn}.wo_a", c.o_groups, c.o_lora_rank, query_dim // c.o_groups),
        wo_b=reader.dense(f"{attn}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank),
        compressor=compressor,
        indexer_wq_b=reader.dense(f"{attn}.indexer.wq_b", index_dim, c.q_lora_rank) if indexed else None,
        indexer_weights=reader.plain(f"{attn}.indexer.weights_proj.weight") if indexed else None,
    )
