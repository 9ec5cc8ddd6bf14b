"""DeepSeek-V3.2 and V3.2-Exp: V3 with sparse attention, each token over those that an indexer chooses.

Keys of config.json: https://huggingface.co/deepseek-ai/DeepSeek-V3.2 and `transformers`' DeepseekV32Config;
of GGUF: what llama.cpp's converter writes for the architecture `deepseek32`.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder import gguf
from engine.families.decoder.description import Description, Layer, Mla
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layers_behind_dense
from engine.families.decoder.indexer import check_layer_types, sharing, with_gguf_indexer, with_indexer
from engine.families.decoder.keys import Keys
from engine.families.decoder.latent import latent_attention
from engine.families.decoder.names import HF_NAMES, draft_layers
from engine.families.deepseek_v3 import gguf_layers
from engine.families.glm4_moe import sigmoid_router
from memory.checkpoint.checkpoint import Checkpoint

NAME = "deepseek_v32"


def describe_deepseek_v32(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        read = gguf.gguf_keys(checkpoint, NAME)
        layers, ignored = gguf_indexed_layers(read, checkpoint, is_interleaved=False)
        return gguf.describe_gguf(read, checkpoint, layers, ignored=ignored)
    read = keys_of(checkpoint, NAME)
    attention = with_indexer(read, latent_attention(read), is_interleaved=False)
    return describe_with_indexers(read, checkpoint, attention)


def describe_with_indexers(
    read: Keys, checkpoint: Checkpoint, attention: Mla, is_shared: tuple[bool, ...] = ()
) -> Description:
    """V3's layers with this attention, which has an indexer.

    is_shared  of each layer, whether it attends to what the last indexer before it has chosen; empty: none
    """
    read.only("hidden_act", "silu", None)
    read.only("moe_layer_freq", 1, None)
    read.only("moe_router_dtype", "float32", None)
    read.only("mlp_bias", False, None)
    layers = layers_behind_dense(
        read, attention, sigmoid_router(read, has_defaults=False), read.count_or_none("n_shared_experts")
    )
    check_layer_types(read, layers)
    if is_shared:
        layers = sharing(layers, is_shared)
    drafts = read.count_or_none("num_nextn_predict_layers") or 0
    return describe(read, checkpoint, layers, HF_NAMES, ignored=draft_layers(len(layers), drafts))


def gguf_indexed_layers(
    read: Keys, checkpoint: Checkpoint, *, is_interleaved: bool
) -> tuple[list[Layer], str]:
    """As `gguf_layers`, each with an indexer. is_interleaved: of `with_gguf_indexer`."""
    read.only("expert_gating_func", gguf.SIGMOID, None)
    layers, ignored = gguf_layers(read, checkpoint, is_sigmoid=True)
    attention = layers[0].attention
    assert isinstance(attention, Mla)
    attention = with_gguf_indexer(read, attention, is_interleaved=is_interleaved)
    return [replace(layer, attention=attention) for layer in layers], ignored


FAMILY = DecoderFamily(NAME, describe_deepseek_v32, rounds_latents=True)
