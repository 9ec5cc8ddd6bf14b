"""Qwen3's mixtures of experts: queries and keys normed per head, softmax routing.

Keys of config.json: https://huggingface.co/Qwen/Qwen3-30B-A3B and `transformers`' Qwen3MoeConfig; of GGUF:
what llama.cpp's converter writes for the architecture `qwen3moe`.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder import gguf
from engine.families.decoder.description import Attention, Description, Experts, Layer, Mlp, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import HF_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "qwen3_moe"


def describe_qwen3_moe(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("use_sliding_window", False, None)
    read.raw("sliding_window")  # of no meaning where it is not used
    read.raw("max_window_layers")
    attention = replace(plain_attention(read), qk_norm="head", has_qkv_bias=read.flag("attention_bias"))
    attention = replace(attention, has_out_bias=attention.has_qkv_bias)
    experts = Experts(
        router=Router(
            experts=read.count("num_experts"),
            top_k=read.count("num_experts_per_tok"),
            score="softmax",
            is_renormalised=read.flag("norm_topk_prob"),
        ),
        width=read.count("moe_intermediate_size"),
        layout="each",
    )
    step, dense = read.count("decoder_sparse_step", 1), read.raw("mlp_only_layers") or []
    mlp = Mlp(read.count("intermediate_size"))
    layers = [
        Layer(attention, mlp if n in dense or (n + 1) % step else experts) for n in range(layer_count(read))
    ]
    return describe(read, checkpoint, layers, HF_NAMES)


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    read.raw("feed_forward_length")  # of dense layers, of which there are none
    attention = Attention(heads, kv_heads, head_dim, gguf.rope_of(read, head_dim, "half"), qk_norm="head")
    router = Router(*gguf.expert_counts(read), "softmax", is_renormalised=True)
    layer = Layer(attention, Experts(router, read.count("expert_feed_forward_length"), "stacked"))
    return gguf.describe_gguf(read, checkpoint, [layer] * gguf.layer_count(read))


FAMILY = DecoderFamily(NAME, describe_qwen3_moe)
