"""The tensors of a DeepSeek-V4 checkpoint: what there must be, as released."""

from __future__ import annotations

import re

from engine.cache.grouped import Groups
from engine.families.deepseek_v4.config import INDEXED, V4Config
from engine.families.streams.stored import Expectations
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec

IGNORED = re.compile(r"mtp\..*")  # draft stages


def expected_tensors(
    c: V4Config, checkpoint: Checkpoint, experts: int | None = None
) -> dict[str, TensorSpec]:
    """Every tensor that text generation needs, with its shape and the dtypes it may have, as released first.

    experts  of each layer; None for all
    """
    expect = Expectations(checkpoint)
    expect.outside(c)
    expect_head_mix(c, expect, "hc_head")
    for n in range(c.layers):
        expect_layer(c, expect, n, experts)
    return expect.specs


def expect_head_mix(c: V4Config, expect: Expectations, name: str) -> None:
    """How streams are read for the head."""
    expect.floats(f"{name}_fn", c.hc_mult, c.hc_mult * c.hidden_size, released="F32")
    expect.floats(f"{name}_base", c.hc_mult, released="F32")
    expect.floats(f"{name}_scale", 1, released="F32")


def expect_layer(c: V4Config, expect: Expectations, n: int, experts: int | None = None) -> None:
    """Those of one layer."""
    layer = f"layers.{n}"
    expect.sublayers(c, layer)
    _expect_attention(c, expect, n)
    gate = f"{layer}.ffn.gate"
    expect.floats(f"{gate}.weight", c.n_routed_experts, c.hidden_size)
    if n < c.hashed_layers:
        expect.specs[f"{gate}.tid2eid"] = TensorSpec((c.vocab_size, c.num_experts_per_tok), ("I64",))
    else:
        expect.floats(f"{gate}.bias", c.n_routed_experts, released="F32")
    expect.experts(c, layer, experts or c.n_routed_experts)


def _expect_attention(c: V4Config, expect: Expectations, n: int) -> None:
    attn = f"layers.{n}.attn"
    expect.attention(c, attn)
    expect.floats(f"{attn}.attn_sink", c.num_attention_heads, released="F32")
    for prefix, groups in zip((attn, f"{attn}.indexer"), c.groups(n), strict=False):
        _expect_compressor(c, expect, f"{prefix}.compressor", groups)
    if c.ratios[n] == INDEXED:
        expect.indexer(c, attn)


def _expect_compressor(c: V4Config, expect: Expectations, name: str, groups: Groups) -> None:
    expect.floats(f"{name}.wkv.weight", groups.width, c.hidden_size)
    expect.floats(f"{name}.wgate.weight", groups.width, c.hidden_size)
    expect.floats(f"{name}.ape", groups.ratio, groups.width, released="F32")
    expect.floats(f"{name}.norm.weight", groups.dim)
