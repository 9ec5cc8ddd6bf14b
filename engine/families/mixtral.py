"""Mixtral: softmax routing over few wide experts; a sliding window where the config has one.

Keys of config.json: https://huggingface.co/mistralai/Mixtral-8x7B-v0.1 and `transformers`' MixtralConfig.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder.description import Description, Experts, Layer, Router
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import W123_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "mixtral"


def describe_mixtral(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    attention = replace(plain_attention(read, theta=1e6), window=read.count_or_none("sliding_window"))
    router = Router(
        experts=read.count("num_local_experts"),
        top_k=read.count("num_experts_per_tok"),
        score="softmax",
        is_renormalised=True,
    )
    experts = Experts(router, read.count("intermediate_size"), "each")
    return describe(read, checkpoint, [Layer(attention, experts)] * layer_count(read), W123_NAMES)


FAMILY = DecoderFamily(NAME, describe_mixtral)
