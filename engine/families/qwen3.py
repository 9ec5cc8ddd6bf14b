"""Qwen3, the dense ones: Llama with queries and keys normed per head.

Keys of config.json: https://huggingface.co/Qwen/Qwen3-8B and `transformers`' Qwen3Config; of GGUF: what
llama.cpp's converter writes for the architecture `qwen3`.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder import gguf
from engine.families.decoder.description import Attention, Description, Layer, Mlp
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import HF_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "qwen3"


def describe_qwen3(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("use_sliding_window", False, None)
    for unused in ("sliding_window", "max_window_layers"):  # of no meaning without it
        read.raw(unused)
    layers = layer_count(read)
    read.only("layer_types", ["full_attention"] * layers, None)
    has_biases = read.flag("attention_bias")
    attention = replace(
        plain_attention(read), qk_norm="head", has_qkv_bias=has_biases, has_out_bias=has_biases
    )
    layer = Layer(attention, Mlp(read.count("intermediate_size")))
    return describe(read, checkpoint, [layer] * layers, HF_NAMES)


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    attention = Attention(heads, kv_heads, head_dim, gguf.rope_of(read, head_dim, "half"), qk_norm="head")
    layer = Layer(attention, Mlp(read.count("feed_forward_length")))
    return gguf.describe_gguf(read, checkpoint, [layer] * gguf.layer_count(read))


FAMILY = DecoderFamily(NAME, describe_qwen3)
