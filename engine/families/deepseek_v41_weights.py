"""The tensors of a DeepSeek-V4.1 checkpoint: what is expected, and views of it as weights.

Names and shapes are the released ones (`docs/deepseek-v41.md`, section 2). Nothing is expanded:
matrices stay packed and mapped; only norms, mixes and biases (a few values per layer) become float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.families.deepseek_v41_config import V41Config
from engine.layers.engram import EngramMix
from engine.layers.hyper_connections import HyperConnection
from engine.model import Component
from memory.budget import MemoryBudget
from memory.checkpoint import Checkpoint, TensorEntry, TensorSpec
from memory.engram_store import EngramStore, TableFiles
from memory.expert_store import ExpertStore
from memory.routing_trace import trace_beside
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.errors import BudgetError, CheckpointError
from quant.formats import Format
from quant.fp8 import FP8_ROW
from quant.kernels import ExpertWeights, Kernels, Weight
from quant.mxfp4 import MXFP4
from quant.packed import PackedTensor
from quant.quantization_config import QuantizationConfig, Role
from quant.stored import FLOAT_DTYPES, format_of, stored_as, unpack, unpack_bytes

# Draft stages and the image encoder: in released checkpoints, not used by text generation.
IGNORED_PREFIXES = ("mtp.", "vision.", "aligner.", "image_")

# Of the DRAM left beside dense weights, what hot rows of Engram tables get where not all fits.
HOT_ROWS_SHARE = 0.05
ROOM_FOR_ALIGNMENT = 1.01  # expert slots begin on cache lines

FLOATS = tuple(FLOAT_DTYPES)


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token uses; dense weights, so packed or plain."""

    w1: Weight
    w3: Weight
    w2: Weight


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


@dataclass(frozen=True)
class V41Weights:
    """The whole model."""

    embed: torch.Tensor
    norm: torch.Tensor
    head: Weight
    layers: tuple[LayerWeights, ...]
    experts: ExpertStore
    engram: EngramStore
    dense_bytes: int


class StoredFormats:
    """Which format each packed weight of a checkpoint is in, from dtypes in headers and the config.

    What is missing from the checkpoint is taken to be as released: then `verify` names it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._entries = checkpoint.entries
        self._config = QuantizationConfig.parse(checkpoint.config)

    def of(self, role: Role, name: str) -> Format | None:
        """The format of matrix `name`; None for plain floats. Raises FormatError for unknown dtypes."""
        weight, scale = self._entries.get(f"{name}.weight"), self._entries.get(f"{name}.scale")
        if weight is None:
            return {Role.EXPERT: MXFP4, Role.DENSE: self._config.dense, Role.ENGRAM: FP8_ROW}[role]
        scale_dtype = None if scale is None else scale.dtype
        if scale_dtype is None and weight.dtype not in FLOATS:
            scale_dtype = "F8_E8M0"
        return format_of(role, weight.dtype, scale_dtype, self._config)

    def packed(self, role: Role, name: str) -> Format:
        """As `of`, for weights that must be packed."""
        format_ = self.of(role, name)
        if format_ is None:
            raise CheckpointError(
                f"{name}.weight is not packed; run `loci quantize` on the checkpoint before serving it"
            )
        return format_

    @property
    def experts(self) -> Format:
        """The format of the routed experts: one for all, that of the first."""
        return self.packed(Role.EXPERT, "layers.0.ffn.experts.0.w1")


class _Expectations:
    """Collects tensor specs; packed matrices are expected in the format that their headers name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.formats = StoredFormats(checkpoint)
        self.specs: dict[str, TensorSpec] = {}

    def floats(self, name: str, *shape: int) -> None:
        self.specs[name] = TensorSpec(shape, FLOATS)

    def dense(self, name: str, rows: int, cols: int) -> None:
        format_ = self.formats.of(Role.DENSE, name)
        if format_ is None:
            self.floats(f"{name}.weight", rows, cols)
        else:
            self.packed(name, format_, rows, cols)

    def packed(self, name: str, format_: Format, rows: int, cols: int) -> None:
        weight, scale = stored_as(format_, rows, cols)
        self.specs[f"{name}.weight"] = TensorSpec(weight.shape, weight.dtypes)
        self.specs[f"{name}.scale"] = TensorSpec(scale.shape, scale.dtypes)


def expected_tensors(config: V41Config, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Every tensor that text generation needs, with its shape and the dtypes it may have."""
    c = config
    expect = _Expectations(checkpoint)
    mixes = (2 + c.hc_mult) * c.hc_mult
    expect.floats("embed.weight", c.vocab_size, c.hidden_size)
    expect.floats("head.weight", c.vocab_size, c.hidden_size)
    expect.floats("norm.weight", c.hidden_size)
    expert_format = expect.formats.experts
    for n in range(c.num_hidden_layers):
        layer = f"layers.{n}"
        for sub in ("attn", "ffn"):
            expect.floats(f"{layer}.{sub}_norm.weight", c.hidden_size)
            expect.floats(f"{layer}.hc_{sub}_fn", mixes, c.hc_mult * c.hidden_size)
            expect.floats(f"{layer}.hc_{sub}_base", mixes)
            expect.floats(f"{layer}.hc_{sub}_scale", 3)
        _expect_attention(c, expect, n)
        expect.floats(f"{layer}.ffn.gate.weight", c.n_routed_experts, c.hidden_size)
        expect.floats(f"{layer}.ffn.gate.bias", c.n_routed_experts)
        if f"{layer}.ffn.gate.bias_vl" in checkpoint.entries:  # only models that see images have it
            expect.floats(f"{layer}.ffn.gate.bias_vl", c.n_routed_experts)
        for e in range(c.n_routed_experts):
            expert = f"{layer}.ffn.experts.{e}"
            expect.packed(f"{expert}.w1", expert_format, c.moe_intermediate_size, c.hidden_size)
            expect.packed(f"{expert}.w3", expert_format, c.moe_intermediate_size, c.hidden_size)
            expect.packed(f"{expert}.w2", expert_format, c.hidden_size, c.moe_intermediate_size)
        shared, width = f"{layer}.ffn.shared_experts", c.moe_intermediate_size * c.n_shared_experts
        expect.dense(f"{shared}.w1", width, c.hidden_size)
        expect.dense(f"{shared}.w3", width, c.hidden_size)
        expect.dense(f"{shared}.w2", c.hidden_size, width)
    for n, rows in zip(c.engram_layer_ids, c.engram_num_embeddings, strict=True):
        engram = f"layers.{n}.engram"
        columns = (c.engram_max_ngram_size - 1) * c.engram_n_heads
        table_format = expect.formats.packed(Role.ENGRAM, f"{engram}.embed")
        expect.packed(f"{engram}.embed", table_format, rows, c.engram_head_dim)
        expect.dense(f"{engram}.wkv", c.hidden_size * (c.hc_mult + 1), columns * c.engram_head_dim)
        expect.floats(f"{engram}.q_weight", c.hc_mult, c.hidden_size)
        expect.floats(f"{engram}.k_weight", c.hc_mult, c.hidden_size)
    return expect.specs


def _expect_attention(c: V41Config, expect: _Expectations, n: int) -> None:
    attn = f"layers.{n}.attn"
    query_dim = c.num_attention_heads * c.head_dim
    expect.dense(f"{attn}.wq_a", c.q_lora_rank, c.hidden_size)
    expect.dense(f"{attn}.wq_b", query_dim, c.q_lora_rank)
    expect.dense(f"{attn}.wkv", c.head_dim, c.hidden_size)
    expect.dense(f"{attn}.wo_a", c.o_groups * c.o_lora_rank, query_dim // c.o_groups)
    expect.dense(f"{attn}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
    expect.floats(f"{attn}.q_norm.weight", c.q_lora_rank)
    expect.floats(f"{attn}.kv_norm.weight", c.head_dim)
    expect.floats(f"{attn}.attn_sink", c.num_attention_heads)
    if n in c.kv_source_layer_ids:
        expect.floats(f"{attn}.compressor.wkv.weight", c.head_dim, c.hidden_size)
        if c.compress_ratios[n] > 1:
            expect.floats(f"{attn}.compressor.wgate.weight", c.head_dim, c.hidden_size)
        expect.floats(f"{attn}.compressor.norm.weight", c.head_dim)
        expect.floats(f"{attn}.indexer.wk.weight", c.index_head_dim, c.head_dim)
        expect.floats(f"{attn}.indexer.k_norm.weight", c.index_head_dim)
    if n in c.index_source_layer_ids:
        expect.dense(f"{attn}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        expect.floats(f"{attn}.indexer.weights_proj.weight", c.index_n_heads, c.hidden_size)


class _Reader:
    """Views of a verified checkpoint's tensors."""

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels) -> None:
        self.checkpoint = checkpoint
        self.kernels = kernels
        self.formats = StoredFormats(checkpoint)

    def plain(self, name: str) -> torch.Tensor:
        """A float tensor as it is stored, mapped."""
        entry = self.checkpoint.entries[name]
        return self.checkpoint.map(name).view(FLOAT_DTYPES[entry.dtype]).view(entry.shape)

    def small(self, name: str) -> torch.Tensor:
        """A norm, bias or mix as float32."""
        return self.plain(name).float()

    def _bytes(self, name: str) -> torch.Tensor:
        return self.checkpoint.map(name).view(self.checkpoint.entries[name].shape)

    def dense(self, name: str, rows: int, cols: int) -> Weight:
        """A dense `[rows, cols]` matrix as the kernels like it."""
        return self.kernels.prepare(self.stored(name, rows, cols))

    def dense_groups(self, name: str, groups: int, rows: int, cols: int) -> tuple[Weight, ...]:
        """A dense matrix cut into `groups` of `rows` rows."""
        stored = self.stored(name, groups * rows, cols)
        starts = range(0, groups * rows, rows)
        if isinstance(stored, torch.Tensor):
            return tuple(self.kernels.prepare(stored[start : start + rows]) for start in starts)
        return tuple(self.kernels.prepare(stored.rows(start, start + rows)) for start in starts)

    def stored(self, name: str, rows: int, cols: int) -> Weight:
        """A dense matrix as the file has it, mapped."""
        format_ = self.formats.of(Role.DENSE, name)
        if format_ is None:
            return self.plain(f"{name}.weight")
        codes, scales = self.checkpoint.map(f"{name}.weight"), self.checkpoint.map(f"{name}.scale")
        return unpack(format_, (rows, cols), codes, scales, self.checkpoint.entries[f"{name}.scale"].dtype)


@dataclass(frozen=True)
class V41ExpertFiles:
    """Where the routed experts of a checkpoint are, for the expert store."""

    checkpoint: Checkpoint
    layers: int
    experts: int
    hidden: int
    width: int
    format: Format

    def entries(self, layer: int, expert: int) -> list[TensorEntry]:
        """The tensors of one expert."""
        names = self.checkpoint.entries
        prefix = self._prefix(layer, expert)
        return [names[f"{prefix}.{w}.{part}"] for w in ("w1", "w3", "w2") for part in ("weight", "scale")]

    def weights(self, layer: int, expert: int, raw: dict[str, torch.Tensor]) -> ExpertWeights:
        """The expert's matrices from the raw bytes of its tensors, by name."""
        prefix = self._prefix(layer, expert)

        def matrix(name: str, rows: int, cols: int) -> PackedTensor:
            codes, scales = raw[f"{prefix}.{name}.weight"], raw[f"{prefix}.{name}.scale"]
            return unpack_bytes(self.format, (rows, cols), codes, scales)

        return ExpertWeights(
            matrix("w1", self.width, self.hidden),
            matrix("w3", self.width, self.hidden),
            matrix("w2", self.hidden, self.width),
        )

    def _prefix(self, layer: int, expert: int) -> str:
        return f"layers.{layer}.ffn.experts.{expert}"


def read_weights(
    config: V41Config, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget
) -> V41Weights:
    """All weights of a checkpoint that `Checkpoint.verify` has accepted.

    Dense weights are copied into memory as the kernels like them. Engram tables and routed experts
    share what is left of the budget: where not everything fits, a small part goes to hot rows of the
    tables (a token needs a few kilobytes of them) and the rest to experts (it needs gigabytes).
    Raises BudgetError where not even the dense weights fit.
    """
    size = dict.fromkeys(("dense", "engram", "routed_experts"), 0)
    for part in components(config, checkpoint):
        size[part.kind if part.kind in size else "dense"] += part.nbytes
    left = budget.dram_bytes - size["dense"]
    if left < 0:
        raise BudgetError(
            f"{checkpoint.path}: the weights that every token uses need {size['dense'] / 1e6:,.1f} MB, "
            f"{budget.dram_bytes / 1e6:,.1f} MB of memory may be used; free some, or take a smaller model"
        )
    everything_fits = size["engram"] + size["routed_experts"] * ROOM_FOR_ALIGNMENT <= left
    hot_rows_bytes = size["engram"] if everything_fits else min(size["engram"], int(left * HOT_ROWS_SHARE))
    reader = _Reader(checkpoint, kernels)
    telemetry = Telemetry()
    files = V41ExpertFiles(
        checkpoint,
        config.num_hidden_layers,
        config.n_routed_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        reader.formats.experts,
    )
    tables = {n: _table_files(config, reader, n) for n in config.engram_layer_ids}
    hotness = trace_beside(checkpoint.path, config.num_hidden_layers, config.n_routed_experts)
    dram = Tier("dram", left - hot_rows_bytes, torch.device("cpu"))
    return V41Weights(
        embed=reader.plain("embed.weight"),
        norm=reader.small("norm.weight"),
        head=reader.plain("head.weight"),
        layers=tuple(_read_layer(config, reader, n) for n in range(config.num_hidden_layers)),
        experts=ExpertStore(files, kernels, dram, budget.cards, telemetry=telemetry, hotness=hotness),
        engram=EngramStore(tables, checkpoint, kernels, hot_rows_bytes, telemetry),
        dense_bytes=size["dense"],
    )


def _table_files(c: V41Config, reader: _Reader, n: int) -> TableFiles:
    name = f"layers.{n}.engram.embed"
    entries = reader.checkpoint.entries
    format_ = reader.formats.packed(Role.ENGRAM, name)
    return TableFiles(entries[f"{name}.weight"], entries[f"{name}.scale"], format_, c.engram_head_dim)


def _read_layer(c: V41Config, reader: _Reader, n: int) -> LayerWeights:
    layer = f"layers.{n}"

    def connection(sub: str) -> HyperConnection:
        prefix = f"{layer}.hc_{sub}"
        return HyperConnection(
            fn=reader.small(f"{prefix}_fn"),
            base=reader.small(f"{prefix}_base"),
            scale=reader.small(f"{prefix}_scale"),
            sinkhorn_iters=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )

    engram = None
    if n in c.engram_layer_ids:
        qk = reader.small(f"{layer}.engram.q_weight") * reader.small(f"{layer}.engram.k_weight")
        columns = (c.engram_max_ngram_size - 1) * c.engram_n_heads * c.engram_head_dim
        wkv = reader.dense(f"{layer}.engram.wkv", c.hidden_size * (c.hc_mult + 1), columns)
        engram = EngramMix(wkv, qk, c.rms_norm_eps)
    shared, width = f"{layer}.ffn.shared_experts", c.moe_intermediate_size * c.n_shared_experts
    return LayerWeights(
        attn_norm=reader.small(f"{layer}.attn_norm.weight"),
        ffn_norm=reader.small(f"{layer}.ffn_norm.weight"),
        hc_attn=connection("attn"),
        hc_ffn=connection("ffn"),
        attn=_read_attention(c, reader, n),
        gate=reader.plain(f"{layer}.ffn.gate.weight"),
        gate_bias=reader.small(f"{layer}.ffn.gate.bias"),
        shared_experts=SharedExpert(
            reader.dense(f"{shared}.w1", width, c.hidden_size),
            reader.dense(f"{shared}.w3", width, c.hidden_size),
            reader.dense(f"{shared}.w2", c.hidden_size, width),
        ),
        engram=engram,
    )


def _read_attention(c: V41Config, reader: _Reader, n: int) -> AttentionWeights:
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


# (dtype of codes, dtype of scales) -> what reports call it
PACKED_NAMES = {
    (codes, scales): name
    for codes in ("I8", "U8")
    for scales, name in (("F8_E8M0", "mxfp4"), ("F32", "nf4"), ("BF16", "int4"))
}


def components(config: V41Config, checkpoint: Checkpoint) -> list[Component]:
    """The model's parts with their bytes and parameters, from headers alone."""
    totals: dict[tuple[str, str], list[int]] = {}
    formats: dict[tuple[str, str], set[str]] = {}
    for name, entry in checkpoint.entries.items():
        if name.startswith(IGNORED_PREFIXES):
            continue
        key = _component_of(name)
        total = totals.setdefault(key, [0, 0])
        total[0] += entry.nbytes
        if not name.endswith(".scale"):
            two_codes_a_byte = entry.dtype in ("I8", "U8")
            total[1] += math.prod(entry.shape) * (2 if two_codes_a_byte else 1)
            scale = checkpoint.entries.get(name.removesuffix(".weight") + ".scale")
            known = PACKED_NAMES.get((entry.dtype, scale.dtype)) if scale is not None else None
            formats.setdefault(key, set()).add(known or entry.dtype.lower())
    return [
        Component(name, kind, "+".join(sorted(formats.get((name, kind), {"?"}))), nbytes, parameters)
        for (name, kind), (nbytes, parameters) in totals.items()
    ]


def _component_of(tensor: str) -> tuple[str, str]:
    """(name, kind) of the component that a tensor belongs to."""
    if tensor.startswith("embed."):
        return "embedding", "embedding"
    if tensor.startswith(("head.", "norm.")):
        return "head", "head"
    parts = tensor.split(".")
    layer = f"layer {parts[1]}" if len(parts) > 1 else tensor
    if ".engram.embed." in tensor:
        return f"engram table, {layer}", "engram"
    if ".ffn.experts." in tensor:
        return f"routed experts, {layer}", "routed_experts"
    if ".ffn.shared_experts." in tensor:
        return "shared experts", "shared_experts"
    if ".ffn.gate." in tensor:
        return "router", "router"
    return "attention and mixes", "dense"
