"""The tensors of a DeepSeek-V4.1 checkpoint: what is expected, in which format, and what it weighs.

Names and shapes are the released ones (`docs/deepseek-v41.md`, section 2).
"""

from __future__ import annotations

import math
import re

from engine.families.base import Component
from engine.families.deepseek_v41.config import V41Config
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from quant.errors import CheckpointError
from quant.formats.fp8 import FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.formats.quantization_config import QuantizationConfig, Role
from quant.formats.stored import FLOAT_DTYPES, format_of, stored_as
from quant.packed import Format

# Draft stages and the image encoder: in released checkpoints, not used by text generation.
IGNORED = re.compile(r"(mtp|vision|aligner)\..*|image_.*")

FLOATS = tuple(FLOAT_DTYPES)


class StoredFormats:
    """The format of each packed weight of a checkpoint, from header dtypes and the config.

    A missing tensor is assumed to be as released; `verify` then reports it.
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
    for name, entry in checkpoint.used(IGNORED).items():
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
