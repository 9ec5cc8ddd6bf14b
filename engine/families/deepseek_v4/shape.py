"""A V4 model's shape for the planner: its actual bytes, part by part, or those of its release."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from engine.cache.grouped import GroupedShape
from engine.families.deepseek_v4.config import V4Config
from engine.families.deepseek_v4.tensors import IGNORED, expected_tensors
from engine.families.parts import Parts
from engine.families.places import HOST
from engine.families.streams.in_memory import InMemory
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.planner.launches import v4_launches
from memory.planner.published import KV_MARGIN
from memory.planner.shape import KeptRows, KvShape, LayerShape, ModelShape, Weights
from quant.formats.kv import GroupedRows, v4_rows
from quant.formats.kv_names import KvFormat

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}  # a value, of what releases have


def loaded_shape(c: V4Config, checkpoint: Checkpoint, name: str, kv_format: KvFormat) -> ModelShape:
    """The shape of a checkpoint called `name` with this config, with the bytes that it takes in memory."""
    held = InMemory(c, checkpoint)
    stored = checkpoint_shape(c, checkpoint, name, kv_format)
    parts = Parts(checkpoint, IGNORED, held.nbytes)
    shape = _shape(c, parts, name, c.n_routed_experts, kv_format)
    ones = Weights(4 * c.head_dim)  # by which query heads are normalised
    return replace(
        shape,
        layers=tuple(replace(layer, dense=layer.dense + ones) for layer in shape.layers),
        slot_bytes=held.slot_bytes(),
        stored_bytes=stored.nbytes,
    )


def checkpoint_shape(c: V4Config, checkpoint: Checkpoint, name: str, kv_format: KvFormat) -> ModelShape:
    """The same with the bytes of its files."""
    return _shape(c, Parts(checkpoint, IGNORED), name, c.n_routed_experts, kv_format)


def config_shape(c: V4Config, alone: Checkpoint, kv_format: KvFormat) -> ModelShape:
    """The shape of the model of a config, that of a checkpoint without tensors: these are as released."""
    entries = {}
    for name, spec in expected_tensors(c, alone, experts=1).items():
        nbytes = math.prod(spec.shape) * BYTES[spec.dtypes[0]]
        entries[name] = TensorEntry(name, spec.dtypes[0], spec.shape, alone.path, 0, nbytes)
    whole = Checkpoint(alone.path, alone.model_type, alone.config, entries, [])
    return _shape(c, Parts(whole, IGNORED), str(alone.path), 1, kv_format)


def cache_shape(
    c: V4Config, devices: tuple[torch.device, ...], kv_format: KvFormat = "float32"
) -> GroupedShape:
    """The sizes of a cache in this format, whose layers' state is on these devices."""
    return GroupedShape(
        window=c.sliding_window,
        head_dim=c.head_dim,
        groups=tuple(c.groups(layer) for layer in range(c.layers)),
        margin=KV_MARGIN,
        devices=devices,
        rows=v4_rows(kv_format, c.head_dim, c.qk_rope_head_dim, c.index_head_dim),
    )


def _shape(c: V4Config, parts: Parts, name: str, counted: int, kv_format: KvFormat) -> ModelShape:
    """The shape; of each layer, `counted` experts are among the parts."""
    cache = cache_shape(c, (HOST,) * c.layers, kv_format)
    layers = []
    for n in range(c.layers):
        experts = parts.of("experts", n)
        layers.append(
            LayerShape(
                dense=parts.of("dense", n),
                kv=_kv(c, cache, n),
                shared=parts.of("shared", n),
                experts=c.n_routed_experts,
                expert=Weights(experts.nbytes // counted, experts.parameters // counted),
                launches=launches_of(c, n, c.max_position_embeddings, cache.rows),
            )
        )
    query_dim = c.num_attention_heads * c.head_dim
    return ModelShape(
        name=name,
        vocab_size=c.vocab_size,
        hidden=c.hidden_size,
        max_context=c.max_position_embeddings,
        top_k=c.num_experts_per_tok,
        embedding=parts.of("embedding"),
        head=parts.of("head"),
        layers=tuple(layers),
        activation_bytes=4 * (2 * c.hc_mult * c.hidden_size + 2 * query_dim),
        host_bytes=sum(parts.of("look_ups", n).nbytes for n in range(c.layers)),
    )


def launches_of(c: V4Config, n: int, context: int, rows: GroupedRows) -> int:
    """Kernels that a recorded step launches for a layer on a GPU, of sequences of up to `context` tokens."""
    kinds, keys = len(c.groups(n)), rows.index_keys
    return v4_launches(
        has_entries=kinds > 0,
        chooses_among=context // c.ratios[n] if kinds > 1 else 0,
        is_encoded=rows.window is not None,
        is_turned=keys is not None and keys.turned,
    )


def _kv(c: V4Config, cache: GroupedShape, n: int) -> KvShape:
    """What a layer keeps of a sequence, and what the next token reads of it."""
    ratio, groups = c.ratios[n], c.groups(n)
    is_indexed = len(groups) > 1
    entry, *index_keys = cache.entry_bytes(n) or (0,)
    return KvShape(
        fixed_bytes=cache.fixed_bytes(n),
        fixed_flops=4 * c.num_attention_heads * c.head_dim * c.sliding_window,
        rows=tuple(
            KeptRows(kind.ratio, nbytes) for kind, nbytes in zip(groups, cache.entry_bytes(n), strict=True)
        ),
        seen_ratio=ratio,
        scan_bytes=sum(index_keys),
        scan_flops=2 * c.index_n_heads * c.index_head_dim if is_indexed else 0,
        selected=c.index_topk if is_indexed else None,
        selected_bytes=entry,
        selected_flops=4 * c.num_attention_heads * c.head_dim,
    )
