"""A V4.1 checkpoint's shape for the planner: its actual bytes, part by part, in files or in memory."""

from __future__ import annotations

from dataclasses import replace

from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.tensors import IGNORED
from engine.families.parts import Parts
from engine.families.streams.in_memory import InMemory
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.published import V41Dims, v41_history_bytes, v41_kv, v41_launches, v41_tail
from memory.planner.shape import LayerShape, ModelShape, Table, Weights
from quant.formats.kv_names import KvFormat


def loaded_shape(c: V41Config, checkpoint: Checkpoint, name: str, kv_format: KvFormat) -> ModelShape:
    """The shape of a checkpoint called `name` with this config, with the bytes that it takes in memory."""
    held = InMemory(c, checkpoint)
    stored = checkpoint_shape(c, checkpoint, name, kv_format)
    shape = _shape(c, Parts(checkpoint, IGNORED, held.nbytes), checkpoint, name, kv_format)
    return replace(shape, slot_bytes=held.slot_bytes(), stored_bytes=stored.nbytes)


def checkpoint_shape(c: V41Config, checkpoint: Checkpoint, name: str, kv_format: KvFormat) -> ModelShape:
    """The same with the bytes of its files."""
    return _shape(c, Parts(checkpoint, IGNORED), checkpoint, name, kv_format)


def _shape(c: V41Config, parts: Parts, checkpoint: Checkpoint, name: str, kv_format: KvFormat) -> ModelShape:
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
        max_context=c.max_position_embeddings,
        kv_sources=c.kv_source_layer_ids,
        index_sources=c.index_source_layer_ids,
        rope_dim=c.qk_rope_head_dim,
    )
    rows = dict(zip(c.engram_layer_ids, c.engram_num_embeddings, strict=True))
    columns = (c.engram_max_ngram_size - 1) * c.engram_n_heads
    layers = []
    for n, kv in enumerate(v41_kv(dims, kv_format)):
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
                table=_table(parts, checkpoint, n, rows[n], columns) if n in rows else None,
                launches=v41_launches(dims, n, has_table=n in rows),
                tail=v41_tail(dims, n),
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
        held_bytes=dims.held_bytes,
        history_bytes=v41_history_bytes(c.engram_max_ngram_size) if rows else 0,
        streams=c.hc_mult,
    )


def _table(parts: Parts, checkpoint: Checkpoint, n: int, rows: int, columns: int) -> Table:
    scales = checkpoint.entries.get(f"layers.{n}.engram.embed.scale")
    scale_bytes = 0 if scales is None else scales.nbytes // rows
    return Table(rows, parts.of("table", n).nbytes // rows, columns, scale_bytes)
