"""The tensors of a Llama checkpoint: what is expected, what is ignored, and what it weighs."""

from __future__ import annotations

import math
import re

from engine.families.base import Component
from engine.families.llama.config import LlamaConfig
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from quant.formats.gguf import FORMATS, PLAIN_DTYPES

# Buffers that old checkpoints store besides the weights, and that every reader recomputes: frequencies
# of rotary embeddings, causal masks.
IGNORED = re.compile(r"(.*\.)?rotary_emb\..*|.*attn\.(masked_)?bias")


def expected_tensors(config: LlamaConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint, with its shape and the types it may have."""
    c, names = config, config.names
    matrix = (*FORMATS, *PLAIN_DTYPES)
    heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
    specs = {
        names["embed"]: TensorSpec((c.vocab_size, c.hidden), matrix),
        names["norm"]: TensorSpec((c.hidden,), tuple(PLAIN_DTYPES)),
    }
    if not c.is_tied:
        specs[names["head"]] = TensorSpec((c.vocab_size, c.hidden), matrix)
    if c.has_rope_factors:
        specs[names["rope_factors"]] = TensorSpec((c.head_dim // 2,), tuple(PLAIN_DTYPES))
    shapes = {
        "q": (heads, c.hidden),
        "k": (kv_heads, c.hidden),
        "v": (kv_heads, c.hidden),
        "o": (c.hidden, heads),
        "gate": (c.ffn_width, c.hidden),
        "up": (c.ffn_width, c.hidden),
        "down": (c.hidden, c.ffn_width),
    }
    for n in range(c.layers):
        for norm in ("attn_norm", "ffn_norm"):
            specs[names[norm].format(n)] = TensorSpec((c.hidden,), tuple(PLAIN_DTYPES))
        for role, shape in shapes.items():
            specs[names[role].format(n)] = TensorSpec(shape, matrix)
    return specs


def components(config: LlamaConfig, checkpoint: Checkpoint) -> list[Component]:
    """Embedding, layers and head (absent where it is the embedding) with their bytes, from headers alone."""
    names = config.names
    parts = {names["head"]: ("head", "head"), names["embed"]: ("embedding", "embedding")}
    grouped: dict[tuple[str, str], list[str]] = {}
    for name in checkpoint.used(IGNORED):
        grouped.setdefault(parts.get(name, ("attention and feed-forward", "dense")), []).append(name)
    return [
        Component(
            name=name,
            kind=kind,
            format="+".join(sorted({checkpoint.entries[tensor].dtype.lower() for tensor in tensors})),
            nbytes=sum(checkpoint.entries[tensor].nbytes for tensor in tensors),
            parameters=sum(math.prod(checkpoint.entries[tensor].shape) for tensor in tensors),
        )
        for (name, kind), tensors in grouped.items()
    ]
