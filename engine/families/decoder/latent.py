"""Multi-head latent attention, as config.json and GGUF metadata describe it.

Keys of config.json: https://huggingface.co/deepseek-ai/DeepSeek-V3 and `transformers`' DeepseekV3Config; of
GGUF: what llama.cpp's converter writes for the architecture `deepseek2`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from engine.families.decoder import gguf, hf
from engine.families.decoder.description import Mla
from engine.families.decoder.keys import Keys
from engine.families.decoder.rope import Rope, yarn_attention_factor
from engine.layers.rope import YarnScaling

# llama.cpp's other constants of YaRN, which it computes with these values only.
CONSTANTS = {key: value for key, value in gguf.ROPE_CONSTANTS.items() if "log_multiplier" not in key}


def latent_attention(read: Keys) -> Mla:
    """As a config.json says."""
    read.only("attention_bias", False, None)
    read.only("rope_interleave", True, None)
    for unused in ("num_key_value_heads", "head_dim", "qk_head_dim"):  # follow from others, or mean nothing
        read.raw(unused)
    plain_dim = read.count("qk_nope_head_dim")
    rope = hf.rope_of(read, read.count("qk_rope_head_dim"), pairs="adjacent")
    return Mla(
        heads=read.count("num_attention_heads"),
        rank=read.count("kv_lora_rank"),
        q_rank=read.count_or_none("q_lora_rank"),
        plain_dim=plain_dim,
        value_dim=read.count("v_head_dim"),
        rope=rope,
        scale=_score_factor(read, rope) / math.sqrt(plain_dim + rope.dims),
    )


def gguf_latent_attention(read: Keys, *, is_split: bool) -> Mla:
    """As GGUF metadata says. is_split: of `Mla`.

    Newer files name the sizes of what is kept and, with `_mla`, those of a head; older ones the latter alone.
    """
    rank = read.count("attention.kv_lora_rank")
    dims = read.count("rope.dimension_count")
    read.raw("attention.head_count_kv")  # 1, or as many as heads: by the form of the file
    if read.raw("attention.key_length_mla") is None:
        head_dim, value_dim = read.count("attention.key_length"), read.count("attention.value_length")
    else:
        head_dim, value_dim = read.count("attention.key_length_mla"), read.count("attention.value_length_mla")
        read.only("attention.key_length", rank + dims)
        read.only("attention.value_length", rank)
    if head_dim <= dims:
        read.problems.append(f"a head of {head_dim} channels has no place for {dims} that turn")
    rope, factor = gguf.rope_of(read, dims, "adjacent", CONSTANTS), 1.0
    read.only("rope.scaling.attn_factor", 1.0, None)
    multiplier = read.raw("rope.scaling.yarn_log_multiplier")
    if isinstance(rope.scaling, YarnScaling):
        if multiplier is not None:  # a tenth of mscale_all_dim
            multiplier = read.number("rope.scaling.yarn_log_multiplier")
            factor = (1 + multiplier * math.log(rope.scaling.factor)) ** 2
        # mscale is mscale_all_dim in every release
        rope = replace(rope, attention_factor=1.0)
    return Mla(
        heads=read.count("attention.head_count"),
        rank=rank,
        q_rank=read.count_or_none("attention.q_lora_rank"),
        plain_dim=max(1, head_dim - dims),
        value_dim=value_dim,
        rope=rope,
        scale=factor / math.sqrt(head_dim),
        is_split=is_split,
    )


def _score_factor(read: Keys, rope: Rope) -> float:
    """What scores are multiplied by besides head_dim ** -0.5: YaRN's factor of `mscale_all_dim`, squared."""
    given = read.raw("rope_scaling") or read.raw("rope_parameters")
    if not isinstance(rope.scaling, YarnScaling) or not given.get("mscale_all_dim"):
        return 1.0
    mscale = read.inner("rope_scaling", given).number("mscale_all_dim")
    return yarn_attention_factor(rope.scaling.factor, mscale) ** 2
