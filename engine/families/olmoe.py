"""OLMoE: queries and keys normed as a whole, then cut if the config says so; softmax routing.

Keys of config.json: https://huggingface.co/allenai/OLMoE-1B-7B-0924 and `transformers`' OlmoeConfig; of
GGUF: what llama.cpp's converter writes for the architecture `olmoe`.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder import gguf
from engine.families.decoder.description import Attention, Description, Experts, Layer, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import HF_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "olmoe"


def describe_olmoe(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("attention_bias", False, None)
    clip = None if read.raw("clip_qkv") is None else read.number("clip_qkv")
    attention = replace(plain_attention(read), qk_norm="whole", clip=clip)
    router = Router(
        experts=read.count("num_experts"),
        top_k=read.count("num_experts_per_tok"),
        score="softmax",
        is_renormalised=read.flag("norm_topk_prob"),
    )
    experts = Experts(router, read.count("intermediate_size"), "each")
    return describe(read, checkpoint, [Layer(attention, experts)] * layer_count(read), HF_NAMES)


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    attention = Attention(heads, kv_heads, head_dim, gguf.rope_of(read, head_dim, "half"), qk_norm="whole")
    read.only("expert_weights_norm", False, None)
    experts = Experts(Router(*gguf.expert_counts(read), "softmax"), gguf.expert_width(read), "stacked")
    return gguf.describe_gguf(read, checkpoint, [Layer(attention, experts)] * gguf.layer_count(read))


FAMILY = DecoderFamily(NAME, describe_olmoe)
