"""What a Llama checkpoint says of itself, in GGUF's words or in those of safetensors directories.

The two spell config keys and tensor names differently and order the channels that rotary embeddings
turn differently: GGUF keeps the two of a pair side by side, safetensors (as `transformers` writes
them) half a head apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from quant.errors import ConfigError
from quant.formats.gguf import FORMATS, PLAIN_DTYPES

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


@dataclass(frozen=True)
class LlamaConfig:
    """What the forward needs to know, and how this checkpoint spells its tensors.

    has_pairs_side_by_side: whether the channels of a rotary pair are neighbours (GGUF) or half a
    head apart (safetensors).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocab_size: int
    max_context: int
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    is_tied: bool
    has_pairs_side_by_side: bool
    names: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} query heads do not divide among {self.kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ConfigError(
                f"a head of {self.head_dim} channels has no rotary pairs; expected an even number"
            )


def parse_config(checkpoint: Checkpoint) -> LlamaConfig:
    """The config of a GGUF file or of a safetensors directory.

    Raises ConfigError for a key that is missing or wrong, and for what this family does not compute:
    experts, biases, stretched rotary embeddings, other activations.
    """
    if "general.architecture" in checkpoint.config:
        return _gguf_config(checkpoint)
    return _hf_config(checkpoint)


def _gguf_config(checkpoint: Checkpoint) -> LlamaConfig:
    read = _Keys(checkpoint)
    hidden, heads = read.count("llama.embedding_length"), read.count("llama.attention.head_count")
    head_dim = read.count("llama.attention.key_length", hidden // heads)
    read.refuse_unless("llama.rope.dimension_count", head_dim, None)
    read.refuse_unless("llama.attention.value_length", head_dim, None)
    read.refuse_unless("llama.rope.scaling.type", "none", None)
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
        rope_theta=read.number("llama.rope.freq_base", 10000.0),
        rms_norm_eps=read.number("llama.attention.layer_norm_rms_epsilon"),
        bos_token_id=next(iter(read.token_ids("tokenizer.ggml.bos_token_id")), None),
        eos_token_ids=read.token_ids(*(f"tokenizer.ggml.{name}_token_id" for name in GGUF_ENDS)),
        is_tied=GGUF_NAMES["head"] not in checkpoint.entries,
        has_pairs_side_by_side=True,
        names=GGUF_NAMES,
    )


def _hf_config(checkpoint: Checkpoint) -> LlamaConfig:
    read = _Keys(checkpoint)
    rope = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise ConfigError(f"{checkpoint.path}: rope scaling {kind!r} is not supported by the llama family")
    read.refuse_unless("hidden_act", "silu", None)
    read.refuse_unless("attention_bias", False, None)
    read.refuse_unless("mlp_bias", False, None)
    hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
    is_tied = checkpoint.config.get("tie_word_embeddings", False) is True
    return LlamaConfig(
        hidden=hidden,
        layers=read.count("num_hidden_layers"),
        heads=heads,
        kv_heads=read.count("num_key_value_heads", heads),
        head_dim=read.count("head_dim", hidden // heads),
        ffn_width=read.count("intermediate_size"),
        vocab_size=read.count("vocab_size"),
        max_context=read.count("max_position_embeddings"),
        rope_theta=read.number("rope_theta", rope.get("rope_theta", 10000.0)),
        rms_norm_eps=read.number("rms_norm_eps"),
        bos_token_id=next(iter(read.token_ids("bos_token_id")), None),
        eos_token_ids=read.token_ids("eos_token_id"),
        is_tied=is_tied and HF_NAMES["head"] not in checkpoint.entries,
        has_pairs_side_by_side=False,
        names=HF_NAMES,
    )


class _Keys:
    """Typed look-ups in a checkpoint's config; every ConfigError names file, key and value."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.config = checkpoint.config

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{self.path}: {key} is {value!r}, expected a positive number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not value.is_integer():
            raise ConfigError(f"{self.path}: {key} is {value!r}, expected a whole number")
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
                f"{self.path}: {key} is {value!r}; the llama family computes {accepted[0]!r} only"
            )


def expected_tensors(config: LlamaConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint, with its shape and the types it may have."""
    c, names = config, config.names
    matrix = (*FORMATS, *PLAIN_DTYPES)
    heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
    specs = {
        names["embed"]: TensorSpec((c.vocab_size, c.hidden), matrix),
        names["norm"]: TensorSpec((c.hidden,), tuple(PLAIN_DTYPES)),
    }
    if not c.is_tied:
        specs[names["head"]] = TensorSpec((c.vocab_size, c.hidden), matrix)
    shapes = {
        "q": (heads, c.hidden),
        "k": (kv_heads, c.hidden),
        "v": (kv_heads, c.hidden),
        "o": (c.hidden, heads),
        "gate": (c.ffn_width, c.hidden),
        "up": (c.ffn_width, c.hidden),
        "down": (c.hidden, c.ffn_width),
    }
    for n in range(c.layers):
        for norm in ("attn_norm", "ffn_norm"):
            specs[names[norm].format(n)] = TensorSpec((c.hidden,), tuple(PLAIN_DTYPES))
        for role, shape in shapes.items():
            specs[names[role].format(n)] = TensorSpec(shape, matrix)
    return specs
