"""The weights of a DeepSeek-V4 model, read from a verified checkpoint within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.families.deepseek_v4.config import INDEXED, V4Config
from engine.families.deepseek_v4.shape import checkpoint_shape
from engine.families.places import HOST, DensePlaces, place
from engine.families.streams.reader import Reader, SharedExpert, StreamExpertFiles
from engine.layers.hyper_connections import HyperConnection, ReadMix
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.reads import RowsOnDisk
from memory.experts.store import ASSUMED_CPU_BYTES_PER_S, ExpertStore
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.tiers import Tier
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
class Indexer:
    """What chooses among entries, by keys that its own compressor makes."""

    wq_b: Weight
    weights: Weight
    compressor: Compressor


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention; wo_a holds one `[o_lora_rank, heads * head_dim / groups]` weight per group.

    head_norm  ones, by which each query head is normalised
    """

    wq_a: Weight
    q_norm: torch.Tensor
    wq_b: Weight
    head_norm: torch.Tensor
    wkv: Weight
    kv_norm: torch.Tensor
    sink: torch.Tensor
    wo_a: tuple[Weight, ...]
    wo_b: Weight
    compressor: Compressor | None
    indexer: Indexer | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer: attention, feed-forward, and the connections around both.

    gate_bias      for the choice of experts; None where token ids choose
    token_experts  `[vocab, top_k]` int64, in host memory: the experts that each token id chooses, or None
    """

    attn_norm: torch.Tensor
    ffn_norm: torch.Tensor
    hc_attn: HyperConnection
    hc_ffn: HyperConnection
    attn: AttentionWeights
    gate: Weight
    gate_bias: torch.Tensor | None
    token_experts: torch.Tensor | None
    shared_experts: SharedExpert

    @property
    def device(self) -> torch.device:
        """The device of these weights, where the layer is computed."""
        return self.attn_norm.device


@dataclass(frozen=True)
class V4Weights:
    """The whole model."""

    embed: torch.Tensor | RowsOnDisk
    hc_head: ReadMix
    norm: torch.Tensor
    head: Weight
    layers: tuple[LayerWeights, ...]
    experts: ExpertStore
    places: DensePlaces


def read_weights(c: V4Config, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> V4Weights:
    """All weights of a checkpoint that `Checkpoint.verify` has accepted.

    Dense weights are copied to where the plan places them, in the layout of the kernels there; routed experts
    get what is left of each GPU and of DRAM. Raises BudgetError where not even the dense weights fit.
    """
    places = place(checkpoint_shape(c, checkpoint, checkpoint.path.name), checkpoint.path, budget)
    host = Reader(checkpoint, kernels)
    by_head = Reader(checkpoint, kernels, places.head)
    tables = [_token_experts(c, host, n) for n in range(c.layers)]
    files = StreamExpertFiles(
        checkpoint,
        c.layers,
        c.n_routed_experts,
        c.hidden_size,
        c.moe_intermediate_size,
        host.formats.experts,
    )
    return V4Weights(
        embed=host.plain("embed.weight") if places.holds_embedding else host.on_disk("embed.weight"),
        hc_head=ReadMix(
            by_head.small("hc_head_fn"),
            by_head.small("hc_head_base"),
            by_head.small("hc_head_scale").expand(c.hc_mult).contiguous(),
            c.hc_eps,
            c.rms_norm_eps,
        ),
        norm=by_head.small("norm.weight"),
        head=by_head.plain("head.weight"),
        layers=tuple(
            _read_layer(c, Reader(checkpoint, kernels, device), n, tables[n])
            for n, device in enumerate(places.layers)
        ),
        experts=ExpertStore(
            files,
            kernels,
            Tier("dram", places.left["dram"], HOST),
            [replace(gpu, budget_bytes=places.left[gpu.name]) for gpu in budget.gpus],
            hotness=trace_of_checkpoint(checkpoint.path, c.layers, c.n_routed_experts),
            cpu_bytes_per_s=budget.cpu_bytes_per_s or ASSUMED_CPU_BYTES_PER_S,
        ),
        places=places,
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


def _read_layer(c: V4Config, reader: Reader, n: int, token_experts: torch.Tensor | None) -> LayerWeights:
    layer = f"layers.{n}"

    def connection(sub: str) -> HyperConnection:
        return reader.connection(
            f"{layer}.hc_{sub}",
            c.hc_mult,
            iterations=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )

    width = c.moe_intermediate_size * c.n_shared_experts
    return LayerWeights(
        attn_norm=reader.small(f"{layer}.attn_norm.weight"),
        ffn_norm=reader.small(f"{layer}.ffn_norm.weight"),
        hc_attn=connection("attn"),
        hc_ffn=connection("ffn"),
        attn=_read_attention(c, reader, n),
        gate=reader.plain(f"{layer}.ffn.gate.weight"),
        gate_bias=reader.small(f"{layer}.ffn.gate.bias") if token_experts is None else None,
        token_experts=token_experts,
        shared_experts=reader.shared_expert(f"{layer}.ffn.shared_experts", width, c.hidden_size),
    )


def _read_attention(c: V4Config, reader: Reader, n: int) -> AttentionWeights:
    attn = f"layers.{n}.attn"
    query_dim = c.num_attention_heads * c.head_dim
    indexer = None
    if c.ratios[n] == INDEXED:
        indexer = Indexer(
            reader.dense(f"{attn}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank),
            reader.plain(f"{attn}.indexer.weights_proj.weight"),
            _read_compressor(reader, f"{attn}.indexer.compressor"),
        )
    return AttentionWeights(
        wq_a=reader.dense(f"{attn}.wq_a", c.q_lora_rank, c.hidden_size),
        q_norm=reader.small(f"{attn}.q_norm.weight"),
        wq_b=reader.dense(f"{attn}.wq_b", query_dim, c.q_lora_rank),
        head_norm=torch.ones(c.head_dim, device=reader.device),
        wkv=reader.dense(f"{attn}.wkv", c.head_dim, c.hidden_size),
        kv_norm=reader.small(f"{attn}.kv_norm.weight"),
        sink=reader.small(f"{attn}.attn_sink"),
        wo_a=reader.dense_groups(f"{attn}.wo_a", c.o_groups, c.o_lora_rank, query_dim // c.o_groups),
        wo_b=reader.dense(f"{attn}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank),
        compressor=_read_compressor(reader, f"{attn}.compressor") if c.ratios[n] else None,
        indexer=indexer,
    )


def _read_compressor(reader: Reader, name: str) -> Compressor:
    return Compressor(
        reader.plain(f"{name}.wkv.weight"),
        reader.plain(f"{name}.wgate.weight"),
        reader.small(f"{name}.ape"),
        reader.small(f"{name}.norm.weight"),
    )
