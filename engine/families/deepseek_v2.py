"""DeepSeek-V2 and V2-Lite: latent attention, softmax routing, shared experts, dense first layers.

Keys of config.json: https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite and `transformers`' DeepseekV2Config.
Their GGUF files are of the architecture `deepseek2`: `engine/families/deepseek_v3.py`.
"""

from __future__ import annotations

from engine.families.decoder.description import Description, Groups, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layers_behind_dense
from engine.families.decoder.keys import Keys
from engine.families.decoder.latent import latent_attention
from engine.families.decoder.names import HF_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "deepseek_v2"


def describe_deepseek_v2(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    read.only("moe_layer_freq", 1, None)
    attention = latent_attention(read)
    layers = layers_behind_dense(read, attention, _router(read), read.count_or_none("n_shared_experts"))
    return describe(read, checkpoint, layers, HF_NAMES)


def _router(read: Keys) -> Router:
    """Softmax of all logits; in groups, of which a group is as good as its best expert."""
    read.only("scoring_func", "softmax", None)
    read.only("norm_topk_prob", False, None)
    read.only("topk_method", "greedy", "group_limited_greedy", None)
    experts = read.count("n_routed_experts")
    groups = Groups(read.count("n_group", 1), read.count("topk_group", 1), best=1)
    if experts % groups.count:
        read.problems.append(f"{experts} experts are not a multiple of {groups.count} groups")
    return Router(
        experts=experts,
        top_k=read.count("num_experts_per_tok"),
        score="softmax",
        groups=groups if read.raw("topk_method") == "group_limited_greedy" and groups.count > 1 else None,
        factor=read.number("routed_scaling_factor", 1.0),
    )


FAMILY = DecoderFamily(NAME, describe_deepseek_v2)
