"""How checkpoints of V4 and V4.1 store tensors: which format each weight is in, from headers and the config.

A packed matrix is two tensors, `NAME.weight` and `NAME.scale`; a plain one is `NAME.weight` alone.
"""

from __future__ import annotations

import math
import re

from engine.families.base import Component
from engine.families.streams.config import StreamConfig
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from quant.errors import CheckpointError
from quant.formats.fp8 import FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.formats.quantization_config import QuantizationConfig, Role
from quant.formats.stored import FLOAT_DTYPES, format_of, stored_as
from quant.packed import Format

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


class Expectations:
    """Collects tensor specs; packed matrices are expected in the format that their headers name.

    Of the dtypes that a spec allows, the first is what releases have.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.formats = StoredFormats(checkpoint)
        self.specs: dict[str, TensorSpec] = {}

    def floats(self, name: str, *shape: int, released: str = "BF16") -> None:
        """A plain tensor."""
        self.specs[name] = TensorSpec(shape, (released, *(dtype for dtype in FLOATS if dtype != released)))

    def dense(self, name: str, rows: int, cols: int) -> None:
        """A matrix that may be packed."""
        format_ = self.formats.of(Role.DENSE, name)
        if format_ is None:
            self.floats(f"{name}.weight", rows, cols)
        else:
            self.packed(name, format_, rows, cols)

    def packed(self, name: str, format_: Format, rows: int, cols: int) -> None:
        """A matrix in this format."""
        weight, scale = stored_as(format_, rows, cols)
        self.specs[f"{name}.weight"] = TensorSpec(weight.shape, weight.dtypes)
        self.specs[f"{name}.scale"] = TensorSpec(scale.shape, scale.dtypes)

    def outside(self, c: StreamConfig, *, is_first: bool = True, is_last: bool = True) -> None:
        """The embedding, and what makes logits: those of a model's first and last part."""
        if is_first:
            self.floats("embed.weight", c.vocab_size, c.hidden_size)
        if is_last:
            self.floats("head.weight", c.vocab_size, c.hidden_size)
            self.floats("norm.weight", c.hidden_size)

    def sublayers(self, c: StreamConfig, layer: str) -> None:
        """The norms and hyper-connections of attention and feed-forward."""
        mixes = (2 + c.hc_mult) * c.hc_mult
        for sub in ("attn", "ffn"):
            self.floats(f"{layer}.{sub}_norm.weight", c.hidden_size)
            connection = f"{layer}.hc_{sub}"
            self.floats(f"{connection}_fn", mixes, c.hc_mult * c.hidden_size, released="F32")
            self.floats(f"{connection}_base", mixes, released="F32")
            self.floats(f"{connection}_scale", 3, released="F32")

    def attention(self, c: StreamConfig, attn: str) -> None:
        """Matrices and norms that attention has in every layer."""
        query_dim = c.num_attention_heads * c.head_dim
        self.dense(f"{attn}.wq_a", c.q_lora_rank, c.hidden_size)
        self.dense(f"{attn}.wq_b", query_dim, c.q_lora_rank)
        self.dense(f"{attn}.wkv", c.head_dim, c.hidden_size)
        self.dense(f"{attn}.wo_a", c.o_groups * c.o_lora_rank, query_dim // c.o_groups)
        self.dense(f"{attn}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
        self.floats(f"{attn}.q_norm.weight", c.q_lora_rank)
        self.floats(f"{attn}.kv_norm.weight", c.head_dim)

    def indexer(self, c: StreamConfig, attn: str) -> None:
        """What a layer that chooses among entries asks with."""
        self.dense(f"{attn}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        self.floats(f"{attn}.indexer.weights_proj.weight", c.index_n_heads, c.hidden_size)

    def experts(self, c: StreamConfig, layer: str, count: int) -> None:
        """`count` routed experts, all in the format of the first layer's first, and the shared one."""
        format_ = self.formats.experts
        for e in range(count):
            for name, rows, cols in _matrices(c.moe_intermediate_size, c.hidden_size):
                self.packed(f"{layer}.ffn.experts.{e}.{name}", format_, rows, cols)
        for name, rows, cols in _matrices(c.moe_intermediate_size * c.n_shared_experts, c.hidden_size):
            self.dense(f"{layer}.ffn.shared_experts.{name}", rows, cols)


def _matrices(width: int, hidden: int) -> tuple[tuple[str, int, int], ...]:
    """Name, rows and columns of an expert's matrices."""
    return ("w1", width, hidden), ("w3", width, hidden), ("w2", hidden, width)


# (dtype of codes, dtype of scales) -> what reports call it
PACKED_NAMES = {
    (codes, scales): name
    for codes in ("I8", "U8")
    for scales, name in (("F8_E8M0", "mxfp4"), ("F32", "nf4"), ("BF16", "int4"))
}


def components(checkpoint: Checkpoint, ignored: re.Pattern[str]) -> list[Component]:
    """The model's parts with their bytes and parameters, from headers alone."""
    totals: dict[tuple[str, str], list[int]] = {}
    formats: dict[tuple[str, str], set[str]] = {}
    for name, entry in checkpoint.used(ignored).items():
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
    if tensor.startswith(("head.", "norm.", "hc_head_")):
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
