"""The configuration of a Llama checkpoint, from GGUF metadata or a safetensors directory.

The two differ in config keys, in tensor names and in the channel order of rotary embeddings: GGUF keeps the
two of a pair side by side, safetensors (as `transformers` writes
them) half a head apart.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.families.llama.rope import LinearScaling, Llama3Scaling, Rope, yarn_attention_factor
from engine.layers.rope import YarnScaling
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import ConfigError

GGUF_NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "ffn_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "rope_factors": "rope_freqs.weight",
}
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
# GGUF's names for tokens that end an answer: of a sequence, of a turn, of a message.
GGUF_ENDS = ("eos", "eot", "eom")
LARGEST = sys.float_info.max
MOST_LAYERS = 10_000  # every layer's tensors are counted: a config that says more is damaged


@dataclass(frozen=True)
class LlamaConfig:
    """What the forward needs, and this checkpoint's tensor names.

    has_pairs_side_by_side: whether the channels of a rotary pair are neighbours (GGUF) or half a
    head apart (safetensors). has_rope_factors: whether a tensor says what each
    rotary pair's frequency is divided by (GGUF's way to write Llama 3.1's scaling).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocab_size: int
    max_context: int
    rope: Rope
    has_rope_factors: bool
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    is_tied: bool
    has_pairs_side_by_side: bool
    names: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.layers > MOST_LAYERS:
            raise ConfigError(f"the config says {self.layers} layers; no model has more than {MOST_LAYERS}")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.heads} query heads are not a multiple of {self.kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, expected an even number for rotary embedding")


def parse_config(checkpoint: Checkpoint) -> LlamaConfig:
    """The config of a GGUF file or of a safetensors directory.

    Raises ConfigError for a key that is missing or wrong, and for what this family does not compute:
    experts, biases, some kinds of stretched rotary embeddings, other activations.
    """
    if "general.architecture" in checkpoint.config:
        return _gguf_config(checkpoint)
    return _hf_config(checkpoint)


def _gguf_config(checkpoint: Checkpoint) -> LlamaConfig:
    read = _Keys(checkpoint.path, checkpoint.config)
    hidden, heads = read.count("llama.embedding_length"), read.count("llama.attention.head_count")
    head_dim = read.count("llama.attention.key_length", hidden // heads)
    read.refuse_unless("llama.rope.dimension_count", head_dim, None)
    read.refuse_unless("llama.attention.value_length", head_dim, None)
    read.refuse_unless("llama.expert_count", 0, None)
    return LlamaConfig(
        hidden=hidden,
        layers=read.count("llama.block_count"),
        heads=heads,
        kv_heads=read.count("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_width=read.count("llama.feed_forward_length"),
        vocab_size=read.count("llama.vocab_size", len(checkpoint.config.get("tokenizer.ggml.tokens", ()))),
        max_context=read.count("llama.context_length"),
        rope=_gguf_rope(read),
        has_rope_factors=GGUF_NAMES["rope_factors"] in checkpoint.entries,
        rms_norm_eps=read.number("llama.attention.layer_norm_rms_epsilon"),
        bos_token_id=next(iter(read.token_ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=read.token_ids(*(f"tokenizer.ggml.{name}_token_id" for name in GGUF_ENDS)),
        is_tied=GGUF_NAMES["head"] not in checkpoint.entries,
        has_pairs_side_by_side=True,
        names=GGUF_NAMES,
    )


def _hf_config(checkpoint: Checkpoint) -> LlamaConfig:
    read = _Keys(checkpoint.path, checkpoint.config)
    read.refuse_unless("hidden_act", "silu", None)
    read.refuse_unless("attention_bias", False, None)
    read.refuse_unless("mlp_bias", False, None)
    hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
    is_tied, names = checkpoint.config.get("tie_word_embeddings", False) is True, HF_NAMES
    if is_tied and names["head"] in checkpoint.entries:
        # Of the two names of one tensor a file may keep either. Where it has both, they may differ.
        is_tied = names["embed"] not in checkpoint.entries
        names = {**names, "embed": names["head"]} if is_tied else names
    return LlamaConfig(
        hidden=hidden,
        layers=read.count("num_hidden_layers"),
        heads=heads,
        kv_heads=read.count("num_key_value_heads", heads),
        head_dim=read.count("head_dim", hidden // heads),
        ffn_width=read.count("intermediate_size"),
        vocab_size=read.count("vocab_size"),
        max_context=read.count("max_position_embeddings"),
        rope=_hf_rope(read),
        has_rope_factors=False,
        rms_norm_eps=read.number("rms_norm_eps"),
        bos_token_id=next(iter(read.token_ids("bos_token_id")), None),
        eos_token_ids=read.token_ids("eos_token_id"),
        is_tied=is_tied,
        has_pairs_side_by_side=False,
        names=names,
    )


GGUF_ROPE_KEYS = {
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.finetuned",  # how the model was made; changes nothing
}
# Of these, llama.cpp computes a Llama with one value only.
GGUF_ROPE_CONSTANTS = {
    "llama.rope.scaling.yarn_ext_factor": 1.0,
    "llama.rope.scaling.yarn_attn_factor": 1.0,
    "llama.rope.scaling.yarn_beta_fast": 32.0,
    "llama.rope.scaling.yarn_beta_slow": 1.0,
    "llama.rope.scaling.yarn_log_multiplier": 0.0,
}


def _gguf_rope(read: _Keys) -> Rope:
    """As llama.cpp reads it: the factor under its new or its old key, linear where no type is named."""
    kind = read.config.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{read.path}: llama.rope.scaling.type is {kind!r}; the llama family supports none, linear, yarn"
        )
    for key in sorted(key for key in read.config if key.startswith("llama.rope.")):
        if key in GGUF_ROPE_CONSTANTS:
            read.refuse_unless(key, GGUF_ROPE_CONSTANTS[key])
        elif key not in GGUF_ROPE_KEYS:
            raise ConfigError(
                f"{read.path}: {key} is {read.config[key]!r}; the llama family does not support it"
            )
    theta = read.number("llama.rope.freq_base", 10000.0)
    attention_factor = read.number("llama.rope.scaling.attn_factor", 1.0)
    keys = ("llama.rope.scaling.factor", "llama.rope.scale_linear")
    key = next((key for key in keys if key in read.config), keys[0])
    factor = 1.0 if read.config.get(key) == 0 else read.number(key, 1.0)
    if kind == "none" or factor == 1:
        return Rope(theta, None, attention_factor)
    if kind == "linear":
        return Rope(theta, LinearScaling(factor), attention_factor)
    original = read.count("llama.rope.scaling.original_context_length", read.count("llama.context_length"))
    return Rope(
        theta, YarnScaling(factor, original, 32.0, 1.0), attention_factor * yarn_attention_factor(factor)
    )


# rope type -> the keys that it has besides those that all have
HF_ROPE_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
HF_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def _hf_rope(outer: _Keys) -> Rope:
    """As `transformers` reads it: of `rope_scaling`, or of `rope_parameters` as newer configs call it."""
    dicts = [outer.config.get(key) for key in ("rope_scaling", "rope_parameters")]
    found = [rope for rope in dicts if rope]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(f"{outer.path}: rope_scaling and rope_parameters disagree; keep one")
    given = found[0] if found else {}
    if not isinstance(given, dict):
        raise ConfigError(f"{outer.path}: rope_scaling is {given!r}, expected an object")
    given = {key: value for key, value in given.items() if value is not None}
    read = _Keys(outer.path, given, "rope_scaling.")
    kind = read.config.get("rope_type", read.config.get("type", "default"))
    if not isinstance(kind, str) or kind not in HF_ROPE_KEYS:
        raise ConfigError(
            f"{outer.path}: rope scaling {kind!r} is not supported by the llama family; it supports "
            f"{', '.join(HF_ROPE_KEYS)}"
        )
    unused = sorted(read.config.keys() - HF_ROPE_KEYS[kind] - HF_ROPE_COMMON)
    if unused:
        raise ConfigError(
            f"{outer.path}: rope_scaling has {', '.join(unused)}, which rope scaling {kind!r} does not use"
        )
    for keys in (read, outer):
        keys.refuse_unless("partial_rotary_factor", 1, None)
    for key in sorted(outer.config.keys() - {"rope_theta", "rope_scaling", "rope_parameters"}):
        if key.startswith(("rope_", "rotary_")):
            outer.refuse_unless(key, False, None)
    theta = read.number("rope_theta", outer.number("rope_theta", 10000.0))
    if kind == "default":
        return Rope(theta)
    context = outer.count("max_position_embeddings")
    original = outer.count(
        "original_max_position_embeddings", read.count("original_max_position_embeddings", context)
    )
    factor = read.number("factor", context / original if kind == "yarn" else None)
    if kind == "dynamic":
        return Rope(theta)  # stretches only what is beyond max_position_embeddings, which no sequence is
    if kind == "linear":
        return Rope(theta, LinearScaling(factor))
    if kind == "llama3":
        low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
        if low >= high:
            raise ConfigError(
                f"{outer.path}: rope_scaling.low_freq_factor {low} is not below high_freq_factor"
            )
        return Rope(theta, Llama3Scaling(factor, original, low, high))
    return _hf_yarn(read, theta, factor, original)


def _hf_yarn(read: _Keys, theta: float, factor: float, original: int) -> Rope:
    read.refuse_unless("truncate", True, None)
    attention_factor = yarn_attention_factor(factor)
    mscale, of_all = read.config.get("mscale"), read.config.get("mscale_all_dim")
    if mscale and of_all:
        attention_factor = yarn_attention_factor(factor, read.number("mscale"))
        attention_factor /= yarn_attention_factor(factor, read.number("mscale_all_dim"))
    return Rope(
        theta,
        YarnScaling(factor, original, read.number("beta_fast", 32.0), read.number("beta_slow", 1.0)),
        read.number("attention_factor", attention_factor),
    )


class _Keys:
    """Typed lookups in a checkpoint's config; every ConfigError names the file, key and value.

    prefix: the path of `config` within the whole config, for messages.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.config = config
        self.prefix = prefix

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            raise ConfigError(f"{self.path}: {self.prefix}{key} is {value!r}, expected a positive number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not value.is_integer():
            raise ConfigError(f"{self.path}: {self.prefix}{key} is {value!r}, expected an integer")
        return int(value)

    def token_ids(self, *keys: str) -> tuple[int, ...]:
        """The ids under `keys`, in order, each once; a key may hold one id, a list, or be absent."""
        found: list[int] = []
        for key in keys:
            value = self.config.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                raise ConfigError(f"{self.path}: {key} is {value!r}, expected a token id")
            found += ids
        return tuple(dict.fromkeys(found))

    def refuse_unless(self, key: str, *accepted: Any) -> None:
        value = self.config.get(key)
        if value not in accepted:
            raise ConfigError(
                f"{self.path}: {self.prefix}{key} is {value!r}; the llama family supports only "
                f"{accepted[0]!r}"
            )
