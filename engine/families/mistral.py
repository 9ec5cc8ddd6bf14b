"""Mistral: Llama with a sliding window where the config has one.

Keys of config.json: https://huggingface.co/mistralai/Mistral-7B-v0.1 and `transformers`' MistralConfig. Its
GGUF files have the architecture `llama`.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder.description import Description, Layer, Mlp
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import describe, keys_of, layer_count, plain_attention
from engine.families.decoder.names import HF_NAMES
from memory.checkpoint.checkpoint import Checkpoint

NAME = "mistral"


def describe_mistral(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    read = keys_of(checkpoint, NAME)
    read.only("hidden_act", "silu", None)
    window = read.count_or_none("sliding_window") if "sliding_window" in read.config else 4096
    attention = replace(plain_attention(read), window=window)
    layer = Layer(attention, Mlp(read.count("intermediate_size")))
    return describe(read, checkpoint, [layer] * layer_count(read), HF_NAMES)


FAMILY = DecoderFamily(NAME, describe_mistral)
