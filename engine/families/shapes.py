"""Shapes for the planner, from a checkpoint's config and headers: its own bytes, part by part."""

from __future__ import annotations

from engine.families.deepseek_v41.config import parse_config as parse_v41
from engine.families.deepseek_v41.shape import checkpoint_shape
from engine.families.llama.config import parse_config as parse_llama
from engine.families.llama.tensors import IGNORED
from engine.families.parts import Parts
from engine.families.registry import family_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.published import KV_VALUE_BYTES
from memory.planner.shape import KvShape, LayerShape, ModelShape, Weights
from quant.errors import ConfigError


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """The shape of a checkpoint, from its config and headers.

    Raises ConfigError for a family that cannot be planned yet, and for a config that it cannot run.
    """
    family = family_of(checkpoint)
    info, _ = family.describe(checkpoint)
    if family.name == "deepseek_v41":
        return checkpoint_shape(parse_v41(checkpoint.config), checkpoint, info.name)
    if family.name == "llama":
        return _llama(checkpoint, info.name)
    raise ConfigError(f"{checkpoint.path}: checkpoints of the {family.name} family cannot be planned yet")


def _llama(checkpoint: Checkpoint, name: str) -> ModelShape:
    c = parse_llama(checkpoint)
    parts = Parts(checkpoint, IGNORED)
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
