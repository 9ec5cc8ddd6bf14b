"""GLM-4.5, 4.6, 4.7 and Air: half of a head turns, sigmoid routing, a shared expert, dense first layers.

Keys of config.json: https://huggingface.co/zai-org/GLM-4.5-Air and `transformers`' Glm4MoeConfig; of GGUF:
what llama.cpp's converter writes for the architecture `glm4moe`, whose layers include the draft layers.
"""

from __future__ import annotations

from engine.families.decoder import gguf
from engine.families.decoder.description import Attention, Description, Groups, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, head_sizes, keys_of, layers_behind_dense, rope_of
from engine.families.decoder.keys import Keys
from engine.families.decoder.names import HF_NAMES, draft_layers
from memory.checkpoint.checkpoint import Checkpoint

NAME = "glm4_moe"
GGUF_NAMES = {**gguf.GGUF_NAMES, "ffn_norm": f"{gguf.BLOCK}post_attention_norm.weight"}


def describe_glm4_moe(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    heads, kv_heads, head_dim = head_sizes(read)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        rope_of(read, head_dim, part=0.5),
        has_qkv_bias=read.flag("attention_bias"),
        qk_norm="head" if read.flag("use_qk_norm") else "none",
    )
    shared = read.count("n_shared_experts", 1)
    layers = layers_behind_dense(read, attention, sigmoid_router(read), shared)
    return describe(
        read,
        checkpoint,
        layers,
        HF_NAMES,
        ignored=draft_layers(len(layers), read.count_or_none("num_nextn_predict_layers") or 0),
    )


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    read = gguf.gguf_keys(checkpoint, NAME)
    heads, kv_heads, head_dim = gguf.head_sizes(read)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        gguf.rope_of(read, read.count("rope.dimension_count"), "half"),
        has_qkv_bias=gguf.has_tensor(checkpoint, "q", ".bias"),
        qk_norm="head" if gguf.has_tensor(checkpoint, "q_norm") else "none",
    )
    read.only("expert_gating_func", gguf.SIGMOID, None)
    for groups in ("expert_group_count", "expert_group_used_count"):
        read.only(groups, 1, None)
    router = Router(
        *gguf.expert_counts(read),
        "sigmoid",
        has_choice_bias=True,
        is_renormalised=read.flag("expert_weights_norm"),
        epsilon=1e-20,
        factor=read.number("expert_weights_scale", 1.0),
    )
    dense = read.count_or_none("leading_dense_block_count") or 0
    layers, ignored = gguf.layers_behind_dense(read, attention, router, dense)
    return gguf.describe_gguf(read, checkpoint, layers, GGUF_NAMES, ignored=ignored)


def sigmoid_router(read: Keys, *, has_defaults: bool = True) -> Router:
    """The router of DeepSeek-V3 and its relatives: sigmoid scores, a bias for the choice, groups.

    has_defaults: there are no groups and no factor where the config is silent; else it must speak.
    """
    default = 1 if has_defaults else None
    read.only("scoring_func", "sigmoid", None)
    read.only("topk_method", "noaux_tc", None)
    groups = Groups(read.count("n_group", default), read.count("topk_group", default), best=2)
    router = Router(
        experts=read.count("n_routed_experts"),
        top_k=read.count("num_experts_per_tok"),
        score="sigmoid",
        has_choice_bias=True,
        groups=groups if groups.count > 1 else None,
        is_renormalised=read.flag("norm_topk_prob", default=True),
        epsilon=1e-20,
        factor=read.number("routed_scaling_factor", default),
    )
    if router.experts % groups.count:
        read.problems.append(f"{router.experts} experts are not a multiple of {groups.count} groups")
    return router


FAMILY = DecoderFamily(NAME, describe_glm4_moe)
