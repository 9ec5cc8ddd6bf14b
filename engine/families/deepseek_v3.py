"""DeepSeek-V3, R1, V3.1 and Kimi-K2: latent attention, sigmoid routing in groups, dense first layers.

Keys of config.json: https://huggingface.co/deepseek-ai/DeepSeek-V3 and `transformers`' DeepseekV3Config; of
GGUF, V2's files too: what llama.cpp's converter writes for the architecture `deepseek2`.
"""

from __future__ import annotations

from engine.families.decoder import gguf
from engine.families.decoder.description import Description, Groups, Layer, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layers_behind_dense
from engine.families.decoder.keys import Keys
from engine.families.decoder.latent import gguf_latent_attention, latent_attention
from engine.families.decoder.names import HF_NAMES, draft_layers
from engine.families.glm4_moe import sigmoid_router
from memory.checkpoint.checkpoint import Checkpoint

NAME = "deepseek_v3"
# What some files have besides the matrix that it is made of.
SPLIT_KV_B = r"blk\.\d+\.attn_[kv]_b\.weight"


def describe_deepseek_v3(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("moe_layer_freq", 1, None)
    attention = latent_attention(read)
    shared = read.count_or_none("n_shared_experts")
    layers = layers_behind_dense(read, attention, sigmoid_router(read, has_defaults=False), shared)
    return describe(
        read,
        checkpoint,
        layers,
        HF_NAMES,
        ignored=draft_layers(len(layers), read.count_or_none("num_nextn_predict_layers") or 0),
    )


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    is_sigmoid = read.raw("expert_gating_func") == gguf.SIGMOID
    read.only("expert_gating_func", gguf.SIGMOID, gguf.SOFTMAX, None)
    layers, ignored = gguf_layers(read, checkpoint, is_sigmoid=is_sigmoid)
    return gguf.describe_gguf(read, checkpoint, layers, ignored=ignored)


def gguf_layers(read: Keys, checkpoint: Checkpoint, *, is_sigmoid: bool) -> tuple[list[Layer], str]:
    """Layers of latent attention as GGUF metadata says, and a regular expression of tensors that they do not
    use.

    is_sigmoid  of the router's scores
    """
    is_split = not gguf.has_tensor(checkpoint, "kv_b")
    attention = gguf_latent_attention(read, is_split=is_split)
    dense = read.count_or_none("leading_dense_block_count") or 0
    has_choice_bias = gguf.has_tensor(checkpoint, "choice_bias", "", dense)
    router = _gguf_router(read, is_sigmoid=is_sigmoid, has_choice_bias=has_choice_bias)
    layers, drafts = gguf.layers_behind_dense(read, attention, router, dense)
    return layers, "|".join(filter(None, (drafts, "" if is_split else SPLIT_KV_B)))


def _gguf_router(read: Keys, *, is_sigmoid: bool, has_choice_bias: bool) -> Router:
    experts, top_k = gguf.expert_counts(read)
    groups = Groups(
        read.count("expert_group_count", 1), read.count("expert_group_used_count", 1), 2 if is_sigmoid else 1
    )
    if experts % groups.count:
        read.problems.append(f"{experts} experts are not a multiple of {groups.count} groups")
    return Router(
        experts,
        top_k,
        "sigmoid" if is_sigmoid else "softmax",
        has_choice_bias=has_choice_bias,
        groups=groups if groups.count > 1 else None,
        is_renormalised=read.flag("expert_weights_norm"),
        epsilon=1e-20,
        factor=read.number("expert_weights_scale", 1.0),
    )


FAMILY = DecoderFamily(NAME, describe_deepseek_v3)
