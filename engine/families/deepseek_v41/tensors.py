"""The tensors of a DeepSeek-V4.1 checkpoint: what is expected, in which format, and what it weighs.

Names and shapes are the released ones (`docs/deepseek-v41.md`, section 2).
"""

from __future__ import annotations

import re

from engine.families.deepseek_v41.config import V41Config
from engine.families.streams.stored import Expectations
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from quant.formats.quantization_config import Role

# Draft stages and the image encoder: in released checkpoints, not used by text generation.
IGNORED = re.compile(r"(mtp|vision|aligner)\..*|image_.*")


def expected_tensors(config: V41Config, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Every tensor that text generation needs, with its shape and the dtypes it may have."""
    c = config
    expect = Expectations(checkpoint)
    expect.outside(c, is_first=c.is_first, is_last=c.is_last)
    for n in range(c.num_hidden_layers):
        layer = f"layers.{n}"
        expect.sublayers(c, layer)
        _expect_attention(c, expect, n)
        expect.floats(f"{layer}.ffn.gate.weight", c.n_routed_experts, c.hidden_size)
        expect.floats(f"{layer}.ffn.gate.bias", c.n_routed_experts)
        if f"{layer}.ffn.gate.bias_vl" in checkpoint.entries:  # only models that see images have it
            expect.floats(f"{layer}.ffn.gate.bias_vl", c.n_routed_experts)
        expect.experts(c, layer, c.n_routed_experts)
    for n, rows in zip(c.engram_layer_ids, c.engram_num_embeddings, strict=True):
        engram = f"layers.{n}.engram"
        columns = (c.engram_max_ngram_size - 1) * c.engram_n_heads
        table_format = expect.formats.packed(Role.ENGRAM, f"{engram}.embed")
        expect.packed(f"{engram}.embed", table_format, rows, c.engram_head_dim)
        expect.dense(f"{engram}.wkv", c.hidden_size * (c.hc_mult + 1), columns * c.engram_head_dim)
        expect.floats(f"{engram}.q_weight", c.hc_mult, c.hidden_size)
        expect.floats(f"{engram}.k_weight", c.hc_mult, c.hidden_size)
    return expect.specs


def _expect_attention(c: V41Config, expect: Expectations, n: int) -> None:
    attn = f"layers.{n}.attn"
    expect.attention(c, attn)
    expect.floats(f"{attn}.attn_sink", c.num_attention_heads)
    if n in c.kv_source_layer_ids:
        expect.floats(f"{attn}.compressor.wkv.weight", c.head_dim, c.hidden_size)
        if c.compress_ratios[n] > 1:
            expect.floats(f"{attn}.compressor.wgate.weight", c.head_dim, c.hidden_size)
        expect.floats(f"{attn}.compressor.norm.weight", c.head_dim)
        expect.floats(f"{attn}.indexer.wk.weight", c.index_head_dim, c.head_dim)
        expect.floats(f"{attn}.indexer.k_norm.weight", c.index_head_dim)
    if n in c.index_source_layer_ids:
        expect.indexer(c, attn)
