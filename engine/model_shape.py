"""Shapes for the planner, from a checkpoint's config and headers: its own bytes, part by part."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from engine.families import family_of
from engine.families.deepseek_v41_config import V41Config
from engine.families.deepseek_v41_config import parse_config as parse_v41
from engine.families.deepseek_v41_tensors import IGNORED_PREFIXES
from engine.families.llama_config import parse_config as parse_llama
from engine.loader import open_checkpoint
from memory.checkpoint import Checkpoint, TensorEntry
from memory.model_shape import KvShape, LayerShape, ModelShape, Table, Weights
from memory.model_shapes import KV_VALUE_BYTES, V41Dims, v41_kv
from quant.errors import ConfigError

LAYER_PREFIXES = ("layers.", "model.layers.", "blk.")


def shape_of(path: Path) -> ModelShape:
    """The shape of the checkpoint at `path`; headers are read, no weights.

    Raises ConfigError for a family that cannot be planned yet, and what opening a checkpoint raises.
    """
    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint)
    info, _ = family.describe(checkpoint)
    if family.name == "deepseek_v41":
        return _v41(parse_v41(checkpoint.config), checkpoint, info.name)
    if family.name == "llama":
        return _llama(checkpoint, info.name)
    raise ConfigError(f"{path}: models of family {family.name} cannot be planned from a checkpoint yet")


class _Parts:
    """A checkpoint's tensors summed up by what they are: `(part, layer)` -> Weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.weights: dict[tuple[str, int], Weights] = defaultdict(Weights)
        for name, entry in checkpoint.entries.items():
            if not name.startswith(IGNORED_PREFIXES):
                self.weights[_part_of(name)] += _weights_of(name, entry)

    def of(self, part: str, layer: int = -1) -> Weights:
        """What a part weighs; nothing where the checkpoint has none."""
        return self.weights.get((part, layer), Weights())


def _part_of(name: str) -> tuple[str, int]:
    prefix = next((p for p in LAYER_PREFIXES if name.startswith(p)), None)
    if prefix is None:
        is_embedding = name.startswith(("embed.", "model.embed_tokens.", "token_embd."))
        return ("embedding" if is_embedding else "head"), -1
    layer = int(name.removeprefix(prefix).partition(".")[0])
    for mark, part in (
        (".engram.embed.", "table"),
        (".ffn.experts.", "experts"),
        (".ffn.shared_experts.", "shared"),
    ):
        if mark in name:
            return part, layer
    return "dense", layer


def _weights_of(name: str, entry: TensorEntry) -> Weights:
    if name.endswith(".scale"):
        return Weights(entry.nbytes, 0)
    two_codes_a_byte = ".ffn.experts." in name and entry.dtype in ("I8", "U8")
    return Weights(entry.nbytes, math.prod(entry.shape) * (2 if two_codes_a_byte else 1))


def _v41(c: V41Config, checkpoint: Checkpoint, name: str) -> ModelShape:
    dims = V41Dims(
        hidden=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        head_dim=c.head_dim,
        q_lora=c.q_lora_rank,
        o_groups=c.o_groups,
        o_lora=c.o_lora_rank,
        experts=c.n_routed_experts,
        width=c.moe_intermediate_size,
        top_k=c.num_experts_per_tok,
        index_heads=c.index_n_heads,
        index_dim=c.index_head_dim,
        index_topk=c.index_topk,
        ratios=c.compress_ratios[: c.num_hidden_layers],
        window=c.sliding_window,
        streams=c.hc_mult,
        vocab=c.vocab_size,
        kv_sources=c.kv_source_layer_ids,
        index_sources=c.index_source_layer_ids,
    )
    parts = _Parts(checkpoint)
    rows = dict(zip(c.engram_layer_ids, c.engram_num_embeddings, strict=True))
    columns = (c.engram_max_ngram_size - 1) * c.engram_n_heads
    layers = []
    for n, kv in enumerate(v41_kv(dims)):
        experts = parts.of("experts", n)
        layers.append(
            LayerShape(
                dense=parts.of("dense", n),
                kv=kv,
                shared=parts.of("shared", n),
                experts=c.n_routed_experts,
                expert=Weights(
                    experts.nbytes // c.n_routed_experts, experts.parameters // c.n_routed_experts
                ),
                table=Table(rows[n], parts.of("table", n).nbytes // rows[n], columns) if n in rows else None,
            )
        )
    return ModelShape(
        name=name,
        vocab_size=c.vocab_size,
        hidden=c.hidden_size,
        max_context=c.max_position_embeddings,
        top_k=c.num_experts_per_tok,
        embedding=parts.of("embedding"),
        head=parts.of("head"),
        layers=tuple(layers),
        activation_bytes=dims.activation_bytes,
    )


def _llama(checkpoint: Checkpoint, name: str) -> ModelShape:
    c = parse_llama(checkpoint)
    parts = _Parts(checkpoint)
    entry_bytes = 2 * KV_VALUE_BYTES * c.kv_heads * c.head_dim
    kv = KvShape(
        ratio=1,
        entry_bytes=entry_bytes,
        seen_ratio=1,
        selected_bytes=entry_bytes,
        selected_flops=4 * c.heads * c.head_dim,
    )
    embedding, head = parts.of("embedding"), parts.of("head")
    if c.is_tied:  # every token multiplies with the embedding, so it is planned as the head
        embedding, head = Weights(), head + embedding
    return ModelShape(
        name=name,
        vocab_size=c.vocab_size,
        hidden=c.hidden,
        max_context=c.max_context,
        top_k=0,
        embedding=embedding,
        head=head,
        layers=tuple(LayerShape(parts.of("dense", n), kv) for n in range(c.layers)),
        activation_bytes=4 * (2 * c.hidden + 2 * c.heads * c.head_dim + 2 * c.ffn_width),
    )
