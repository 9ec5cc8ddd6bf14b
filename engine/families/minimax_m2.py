"""MiniMax-M2 and its successors: queries and keys normed as a whole, a part of a head turns, sigmoid routing.

Keys of config.json: https://huggingface.co/MiniMaxAI/MiniMax-M2 and `transformers`' MiniMaxM2Config; of
GGUF: what llama.cpp's converter writes for the architecture `minimax-m2`.
"""

from __future__ import annotations

from engine.families.decoder import gguf
from engine.families.decoder.description import Attention, Description, Experts, Layer, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, head_sizes, keys_of, layer_count, rope_of
from engine.families.decoder.names import W123_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "minimax_m2"


def describe_minimax_m2(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("scoring_func", "sigmoid", None)
    read.only("use_qk_norm", True, None)
    read.only("qk_norm_type", "per_layer", None)
    read.only("use_routing_bias", True, None)
    for draft in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers"):
        read.raw(draft)
    heads, kv_heads, head_dim = head_sizes(read)
    layers = layer_count(read)
    types = read.raw("attn_type_list")
    if types is not None and types != [1] * layers:  # others are linear attention, in an earlier model
        read.refuse_choice("attn_type_list", types, ["1 for each layer"])
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        rope_of(read, read.count("rotary_dim"), theta=5e6),
        qk_norm="whole",
    )
    router = _router(read.count("num_local_experts"), read.count("num_experts_per_tok"))
    experts = Experts(router, read.count("intermediate_size"), "each")
    return describe(
        read, checkpoint, [Layer(attention, experts)] * layers, W123_NAMES, ignored=r"model\.mtp.*|mtp\..*"
    )


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    rope = gguf.rope_of(read, read.count("rope.dimension_count", head_dim), "half")
    attention = Attention(heads, kv_heads, head_dim, rope, qk_norm="whole")
    read.only("expert_gating_func", gguf.SIGMOID)
    read.only("expert_weights_norm", True, None)
    read.only("expert_weights_scale", 1.0, None)
    experts = Experts(_router(*gguf.expert_counts(read)), gguf.expert_width(read), "stacked")
    return gguf.describe_gguf(read, checkpoint, [Layer(attention, experts)] * gguf.layer_count(read))


def _router(experts: int, top_k: int) -> Router:
    return Router(experts, top_k, "sigmoid", has_choice_bias=True, is_renormalised=True)


FAMILY = DecoderFamily(NAME, describe_minimax_m2)
