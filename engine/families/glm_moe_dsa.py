"""GLM-5, 5.1 and 5.2: latent attention without YaRN, over tokens that indexers choose; a layer may share the
choice of the last one before it.

Keys of config.json: https://huggingface.co/zai-org/GLM-5 and `transformers`' GlmMoeDsaConfig; of GGUF: what
llama.cpp's converter writes for the architecture `glm-dsa`, whose layers include the draft layers.
"""

from __future__ import annotations

from engine.families.decoder import gguf
from engine.families.decoder.description import Description
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.hf import keys_of, layer_count
from engine.families.decoder.indexer import sharing, with_indexer
from engine.families.decoder.keys import Keys
from engine.families.decoder.latent import latent_attention
from engine.families.deepseek_v32 import describe_with_indexers, gguf_indexed_layers
from memory.checkpoint.checkpoint import Checkpoint

NAME = "glm_moe_dsa"
PATTERN = {"F": "full", "S": "shared"}


def describe_glm_moe_dsa(checkpoint: Checkpoint) -> Description:
    """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
    if gguf.is_gguf(checkpoint):
        return _describe_gguf(checkpoint)
    read = keys_of(checkpoint, NAME)
    read.raw("index_share_for_mtp_iteration")  # of drafts
    attention = with_indexer(read, latent_attention(read), is_interleaved=True)
    return describe_with_indexers(read, checkpoint, attention, _shared_layers(read))


def _describe_gguf(checkpoint: Checkpoint) -> Description:
    """Older files do not say which layers have indexers: those with an indexer's tensors."""
    read = gguf.gguf_keys(checkpoint, NAME)
    layers, ignored = gguf_indexed_layers(read, checkpoint, is_interleaved=True)
    is_there = [gguf.has_tensor(checkpoint, "index_k", layer=n) for n in range(len(layers))]
    said = read.raw("attention.indexer.types")
    if said is not None and [bool(one) for one in said] != is_there:
        read.refuse("attention.indexer.types", said, f"but the file has indexers as in {is_there}")
    if not is_there[0]:
        read.problems.append("the first layer has no indexer, and none before it to share a choice with")
    layers = sharing(layers, [not has_it for has_it in is_there])
    return gguf.describe_gguf(read, checkpoint, layers, ignored=ignored)


def _shared_layers(read: Keys) -> tuple[bool, ...]:
    """Which layers share an indexer's choice: as `indexer_types` says, else `index_topk_pattern`.

    Without them, every `index_topk_freq`-th layer from `index_skip_topk_offset` - 1 on has an indexer, and so
    have those before it.
    """
    layers = layer_count(read)
    types, pattern = read.raw("indexer_types"), read.raw("index_topk_pattern")
    every, first = read.count("index_topk_freq", 1), read.raw("index_skip_topk_offset")
    first = 2 if first is None else first
    if types is None and pattern is not None:
        types = [PATTERN.get(kind, kind) for kind in pattern] if isinstance(pattern, str) else pattern
    if types is None and isinstance(first, int):
        types = ["shared" if max(n - first + 1, 0) % every else "full" for n in range(layers)]
    if (
        not isinstance(types, list)
        or len(types) != layers
        or types[0] != "full"
        or not all(kind in PATTERN.values() for kind in types)
    ):
        read.refuse("indexer_types", types, f"expected 'full' or 'shared' for {layers} layers, 'full' first")
        return (False,) * layers
    return tuple(kind == "shared" for kind in types)


FAMILY = DecoderFamily(NAME, describe_glm_moe_dsa)
