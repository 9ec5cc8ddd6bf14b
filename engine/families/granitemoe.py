"""Granite's mixtures of experts: four multipliers, experts chosen by logits, stored fused.

Keys of config.json: https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-instruct and `transformers`'
GraniteMoeConfig; of GGUF: what llama.cpp's converter writes for the architecture `granitemoe`.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder import gguf
from engine.families.decoder.description import Attention, Description, Experts, Layer, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import BLOCK, HF_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "granitemoe"
NAMES = {
    **HF_NAMES,
    "router": f"{BLOCK}router.layer.weight",
    "experts_up": f"{BLOCK}input_linear.weight",
    "experts_down": f"{BLOCK}output_linear.weight",
}


def describe_granitemoe(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    has_biases = read.flag("attention_bias")
    attention = replace(
        plain_attention(read),
        scale=read.number("attention_multiplier", 1.0),
        has_qkv_bias=has_biases,
        has_out_bias=has_biases,
    )
    router = Router(
        experts=read.count("num_local_experts"),
        top_k=read.count("num_experts_per_tok"),
        score="chosen softmax",
    )
    experts = Experts(router, read.count("intermediate_size"), "halves")
    return describe(
        read,
        checkpoint,
        [Layer(attention, experts)] * layer_count(read),
        NAMES,
        embedding_factor=read.number("embedding_multiplier", 1.0),
        residual_factor=read.number("residual_multiplier", 1.0),
        logits_factor=1 / read.number("logits_scaling", 1.0),
    )


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    read.only("rope.scaling.finetuned", True, None)  # here, whether positions are encoded at all
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        gguf.rope_of(read, head_dim, "adjacent"),  # the converter has permuted the rows of queries and keys
        scale=read.number("attention.scale") if read.raw("attention.scale") else None,
    )
    router = Router(*gguf.expert_counts(read), "chosen softmax")
    experts = Experts(router, gguf.expert_width(read), "stacked")
    return gguf.describe_gguf(
        read,
        checkpoint,
        [Layer(attention, experts)] * gguf.layer_count(read),
        embedding_factor=read.number("embedding_scale", 1.0),
        residual_factor=read.number("residual_scale", 1.0),
        logits_factor=1 / read.number("logit_scale"),
    )


FAMILY = DecoderFamily(NAME, describe_granitemoe)
