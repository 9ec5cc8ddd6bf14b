"""gpt-oss: sinks, windows on every other layer, biases everywhere, an activation of its own.

Keys of config.json: https://huggingface.co/openai/gpt-oss-20b and `transformers`' GptOssConfig, whose model
has the activation's constants; of GGUF: what llama.cpp's converter writes for the architecture `gpt-oss`. Its
YaRN range is not rounded (`truncate` is false), which llama.cpp does.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder import gguf
from engine.families.decoder.description import Activation, Attention, Description, Experts, Layer, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import HF_NAMES, LAYER
from memory.checkpoint.checkpoint import Checkpoint

NAME = "gpt_oss"
NAMES = {
    **HF_NAMES,
    "router": f"{LAYER}mlp.router.weight",
    "experts_up": f"{LAYER}mlp.experts.gate_up_proj",
    "experts_down": f"{LAYER}mlp.experts.down_proj",
}
GGUF_NAMES = {**gguf.GGUF_NAMES, "ffn_norm": f"{gguf.BLOCK}post_attention_norm.weight"}
ALPHA, LIMIT = 1.702, 7.0  # of the activation
WINDOWED = {"sliding_attention": True, "full_attention": False}


def describe_gpt_oss(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("attention_bias", True, None)
    for other_name in ("experts_per_token", "initial_context_length"):
        read.raw(other_name)
    layers = layer_count(read)
    types = read.raw("layer_types")
    if types is None:
        types = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
    elif not isinstance(types, list) or len(types) != layers or not set(types) <= WINDOWED.keys():
        read.refuse("layer_types", types, f"expected {layers} of {', '.join(WINDOWED)}")
        types = ["full_attention"] * layers
    window = read.count("sliding_window", 128)
    experts = _experts(
        read.count("num_local_experts"),
        read.count("num_experts_per_tok"),
        read.count("intermediate_size"),
        read.number("swiglu_limit", LIMIT),
    )
    if not (read.raw("rope_scaling") or read.raw("rope_parameters")):
        read.problems.append("rope_scaling is missing; the models of this family have YaRN")
    attention = _attention(plain_attention(read, theta=150_000.0))
    return describe(
        read,
        checkpoint,
        [
            Layer(
                replace(attention, window=window if WINDOWED[kind] else None),
                replace(experts, layout="interleaved"),
            )
            for kind in types
        ],
        NAMES,
    )


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    read.raw("feed_forward_length")
    window = read.count("attention.sliding_window")
    rope = gguf.rope_of(read, head_dim, "half", is_rounded=False)
    attention = _attention(Attention(heads, kv_heads, head_dim, rope))
    experts = _experts(*gguf.expert_counts(read), read.count("expert_feed_forward_length"), LIMIT)
    layers = [
        Layer(replace(attention, window=None if n % 2 else window), experts)
        for n in range(gguf.layer_count(read))
    ]
    return gguf.describe_gguf(read, checkpoint, layers, GGUF_NAMES)


def _attention(attention: Attention) -> Attention:
    return replace(attention, has_qkv_bias=True, has_out_bias=True, has_sinks=True)


def _experts(count: int, top_k: int, width: int, limit: float) -> Experts:
    router = Router(count, top_k, "chosen softmax", has_bias=True)
    return Experts(router, width, "stacked", Activation(limit, ALPHA, 1.0), has_biases=True)


FAMILY = DecoderFamily(NAME, describe_gpt_oss)
