"""Llama and SmolLM2: dense decoders, from safetensors or GGUF.

Keys of config.json: `transformers`' LlamaConfig; of GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from engine.families.decoder import gguf
from engine.families.decoder.description import Attention, Description, Experts, Layer, Mlp, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import HF_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "llama"


def describe_llama(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("attention_bias", False, None)
    read.only("mlp_bias", False, None)
    layer = Layer(plain_attention(read), Mlp(read.count("intermediate_size")))
    return describe(read, checkpoint, [layer] * layer_count(read), HF_NAMES)


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    # The converter has permuted the rows of queries and keys.
    attention = Attention(heads, kv_heads, head_dim, gguf.rope_of(read, head_dim, "adjacent"))
    width = read.count("feed_forward_length")
    layer = Layer(attention, Mlp(width))
    if read.raw("expert_count"):  # Mixtral
        router = Router(*gguf.expert_counts(read), "softmax", is_renormalised=True)
        layer = Layer(attention, Experts(router, width, "stacked"))
        read.only("expert_feed_forward_length", width, None)
    read.raw("expert_used_count")
    return gguf.describe_gguf(read, checkpoint, [layer] * gguf.layer_count(read))


FAMILY = DecoderFamily(NAME, describe_llama)
