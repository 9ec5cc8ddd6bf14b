"""GGUF files of mixtures of experts with random weights: a release's widths and types, few layers.

Loading, placing and computing such a file costs what the release's own costs, layer by layer; only its
output is meaningless. The vocabulary shrinks with the layers, so that the head keeps its share of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.tensors import Use, uses
from engine.families.registry import family_of
from engine.families.released import RELEASED
from engine.tokenizer.gguf import CONTROL, NORMAL
from engine.tokenizer.synthetic import BOS, EOS, SPECIAL_TOKENS, merges_of, synthetic_tokenizer
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.random_blocks import RandomValues
from memory.checkpoint.random_gguf import RandomGguf, Value
from quant.errors import ConfigError
from quant.formats.gguf import FORMATS

LEAST_VOCAB = 1024
VOCAB_STEP = 64


@dataclass(frozen=True)
class _Kind:
    """What files of one architecture have in common.

    pre       how its tokenizer cuts, as GGUF names it
    metadata  of a config, under keys without the architecture
    type_of   of a matrix: a name without `.weight`, the layer, the number of layers
    """

    architecture: str
    pre: str
    metadata: Callable[[Mapping[str, Any]], dict[str, Value]]
    type_of: Callable[[str, int, int], str]


def _qwen3_metadata(config: Mapping[str, Any]) -> dict[str, Value]:
    return {
        "feed_forward_length": config["intermediate_size"],
        "expert_count": config["num_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def _gpt_oss_metadata(config: Mapping[str, Any]) -> dict[str, Value]:
    scaling = config["rope_scaling"]
    return {
        "feed_forward_length": config["intermediate_size"],
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
        "attention.sliding_window": config["sliding_window"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling["factor"]),
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
    }


def _q4_k_m(role: str, layer: int, layers: int) -> str:
    """As llama.cpp's Q4_K_M: six bits for the head, and in half of the layers for values and down."""
    more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if role == "output" or (role in ("attn_v", "ffn_down_exps") and more_bits):
        return "Q6_K"
    return "Q4_K"


def _mxfp4(role: str, layer: int, layers: int) -> str:
    """As gpt-oss is published: MXFP4 experts, eight bits for the rest."""
    return "MXFP4" if role.endswith("_exps") else "Q8_0"


_KINDS = {
    "qwen3_moe": _Kind("qwen3moe", "qwen2", _qwen3_metadata, _q4_k_m),
    "gpt_oss": _Kind("gpt-oss", "gpt-4o", _gpt_oss_metadata, _mxfp4),
}
# As narrow as their types allow; for tests.
_TINY = {
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": LEAST_VOCAB,
    "max_position_embeddings": 4096,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    **{name: config for name, config in RELEASED.items() if config["model_type"] in _KINDS},
    "qwen3-moe-tiny": RELEASED["qwen3-30b-a3b"] | _TINY | {
        "hidden_size": 256, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 3,
        "intermediate_size": 512, "moe_intermediate_size": 256,
    },
    "gpt-oss-tiny": RELEASED["gpt-oss-20b"] | _TINY | {
        "hidden_size": 96, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 3,
        "intermediate_size": 160, "sliding_window": 16,
    },
}  # fmt: skip


def plan_gguf(name: str, layers: int) -> RandomGguf:
    """The file of a slice of the shape `name` with `layers` layers. Raises ConfigError for what cannot be."""
    if name not in SHAPES:
        raise ConfigError(f"{name}: unknown shape; known: {', '.join(SHAPES)}")
    return plan_of(SHAPES[name], layers, name)


def plan_of(config: Mapping[str, Any], layers: int, name: str) -> RandomGguf:
    """The same of a config in the names of config.json; `name` is for messages.

    Raises ConfigError for layers that the config has not, and for widths that its types cannot store.
    """
    most = config["num_hidden_layers"]
    if not 1 <= layers <= most:
        raise ConfigError(f"{name}: {layers} layers; expected 1 to {most}")
    kind = _KINDS[config["model_type"]]
    share = config["vocab_size"] * layers // most // VOCAB_STEP * VOCAB_STEP
    metadata = _metadata(config, kind, layers, max(share, LEAST_VOCAB))
    # an untied head: a family looks whether there is one
    head = TensorEntry("output.weight", "F32", (), Path(name), 0, 0)
    nothing_yet = Checkpoint(Path(name), kind.architecture, metadata, {head.name: head}, [])
    family = family_of(nothing_yet)
    assert isinstance(family, DecoderFamily)
    tensors = {}
    for use in uses(family.description(nothing_yet)):
        values = _values(use, kind, layers)
        _check_columns(use, values, name)
        tensors[use.name] = use.shape, values
    return RandomGguf(metadata, tensors)


def _metadata(config: Mapping[str, Any], kind: _Kind, layers: int, vocab_size: int) -> dict[str, Value]:
    tokenizer = synthetic_tokenizer(vocab_size)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    of_architecture: dict[str, Value] = {
        "block_count": layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
        "expert_used_count": config["num_experts_per_tok"],
        **kind.metadata(config),
    }
    return {
        "general.architecture": kind.architecture,
        **{f"{kind.architecture}.{key}": value for key, value in of_architecture.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind.pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges_of(vocab_size)],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": False,
    }


def _values(use: Use, kind: _Kind, layers: int) -> RandomValues:
    """Values that keep a forward's near one: matrices by the width of what they read."""
    if not use.is_matrix:
        is_norm = "norm" in use.name
        return RandomValues("F32", 0.1, 1.0) if is_norm else RandomValues("F32", 0.01)
    std = 1.0 if use.part == "embedding" else use.shape[-1] ** -0.5
    if use.part == "router":
        return RandomValues("F32", std)
    role = use.name.removesuffix(".weight").rpartition(".")[2]
    return RandomValues(kind.type_of(role, use.layer or 0, layers), std)


def _check_columns(use: Use, values: RandomValues, name: str) -> None:
    if values.dtype == "F32":
        return
    block = FORMATS[values.dtype].tile_cols
    if use.shape[-1] % block:
        raise ConfigError(
            f"{name}: {use.name} has {use.shape[-1]} columns, which {values.dtype} cannot store; "
            f"expected a multiple of {block}"
        )
