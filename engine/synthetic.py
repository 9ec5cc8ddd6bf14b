"""Slices of DeepSeek V4.1 with random weights: real dimensions, names and formats, fewer layers and rows.

Placing, moving and computing such a slice costs what the model itself costs, layer by layer; only its output
is meaningless.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.families.deepseek_v41.config import V41Config, parse_config
from engine.families.deepseek_v41.tensors import expected_tensors
from engine.layers.engram_hash import build_token_map, table_primes
from engine.tokenizer.synthetic import BOS, EOS, PAD, SPECIAL_TOKENS, synthetic_tokenizer
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from memory.checkpoint.random_files import (
    Codes,
    Fill,
    Normal,
    RandomCheckpoint,
    RandomTensor,
    e4m3_rms,
    scales_for,
)
from memory.planner.published import V41_FLASH
from quant.errors import ConfigError

MODEL_TYPE = "deepseek_v41"
ROPE_THETA = 10000.0  # of layers with windows only
# A slice's layers are some of the released model's, which keep what they do there: these first. Two with
# windows only (one reads Engram), a source and a layer that reuses it, then the decoder's source, one
# that chooses anew among its candidates, one that reuses that, and the encoder's source with Engram.
ORDER = (0, 1, 2, 3, 20, 24, 21, 14)
MIN_LAYERS = 3
FP4_RMS = math.sqrt((0 + 0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)
FLOAT32_PARTS = (".hc_", "attn_sink", ".gate.bias", ".engram.q_weight", ".engram.k_weight")


@dataclass(frozen=True)
class Widths:
    """The differences between shapes besides layers, experts and rows; fields as in config.json."""

    hidden_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    candidate_topk_blocks: int
    candidate_block_size: int
    engram_n_heads: int
    engram_head_dim: int
    vocab_size: int
    max_position_embeddings: int


SHAPES = {
    "deepseek-v4.1-flash": Widths(
        hidden_size=V41_FLASH.hidden, moe_intermediate_size=V41_FLASH.width,
        num_attention_heads=V41_FLASH.heads, head_dim=V41_FLASH.head_dim, qk_rope_head_dim=64,
        q_lora_rank=V41_FLASH.q_lora, o_groups=V41_FLASH.o_groups, o_lora_rank=V41_FLASH.o_lora,
        n_routed_experts=V41_FLASH.experts, num_experts_per_tok=V41_FLASH.top_k,
        sliding_window=V41_FLASH.window, index_n_heads=V41_FLASH.index_heads,
        index_head_dim=V41_FLASH.index_dim, index_topk=V41_FLASH.index_topk,
        candidate_topk_blocks=64, candidate_block_size=64,  # not published; they move no weights
        engram_n_heads=8, engram_head_dim=V41_FLASH.engram_dim,
        vocab_size=V41_FLASH.vocab, max_position_embeddings=V41_FLASH.max_context,
    ),
    "v41-tiny": Widths(
        hidden_size=128, moe_intermediate_size=64, num_attention_heads=4, head_dim=64, qk_rope_head_dim=16,
        q_lora_rank=64, o_groups=2, o_lora_rank=32, n_routed_experts=16, num_experts_per_tok=4,
        sliding_window=16, index_n_heads=32, index_head_dim=32, index_topk=8, candidate_topk_blocks=3,
        candidate_block_size=4, engram_n_heads=2, engram_head_dim=32, vocab_size=1024,
        max_position_embeddings=2048,
    ),
    # A twentieth of V4.1-Flash's width. With 6,000 tokens, index scores have about the share of the
    # arithmetic that they have there with 32,000.
    "v41-narrow": Widths(
        hidden_size=256, moe_intermediate_size=128, num_attention_heads=8, head_dim=64, qk_rope_head_dim=16,
        q_lora_rank=64, o_groups=2, o_lora_rank=64, n_routed_experts=24, num_experts_per_tok=6,
        sliding_window=16, index_n_heads=2, index_head_dim=32, index_topk=32, candidate_topk_blocks=8,
        candidate_block_size=8, engram_n_heads=2, engram_head_dim=32, vocab_size=1024,
        max_position_embeddings=16_384,
    ),
}  # fmt: skip


def plan_slice(name: str, layers: int, engram_rows: int, experts: int | None = None) -> RandomCheckpoint:
    """The files of a slice of the shape `name`: `layers` layers, tables of about `engram_rows` rows each.

    `experts` routed experts in a layer instead of the shape's own. Raises ConfigError for what cannot be.
    """
    if name not in SHAPES:
        raise ConfigError(f"{name}: unknown shape; known: {', '.join(SHAPES)}")
    widths = SHAPES[name]
    tokenizer = synthetic_tokenizer(widths.vocab_size)
    keys = int(build_token_map(tokenizer, widths.vocab_size).max()) + 1
    raw = _config(widths, layers, engram_rows, experts or widths.n_routed_experts, keys)
    config = parse_config(raw)
    nothing_yet = Checkpoint(Path(name), MODEL_TYPE, raw, {}, [])
    specs = expected_tensors(config, nothing_yet)
    for n in range(layers):
        specs[f"layers.{n}.ffn.gate.bias_vl"] = TensorSpec((config.n_routed_experts,), ("F32",))
    return RandomCheckpoint(shards_of(specs, partial(_fill, config=config)), raw, tokenizer_texts(tokenizer))


def tokenizer_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a synthetic tokenizer, by name."""
    texts = {"bos_token": SPECIAL_TOKENS[BOS], "eos_token": SPECIAL_TOKENS[EOS], "add_bos_token": True}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(texts)}


def released_layers(count: int) -> list[int]:
    """Which of the released model's layers a slice of `count` has, ascending."""
    if not MIN_LAYERS <= count <= V41_FLASH.layers:
        raise ConfigError(f"{count} layers: expected {MIN_LAYERS} to {V41_FLASH.layers}")
    others = (n for n in range(V41_FLASH.layers) if n not in ORDER)
    return sorted([*ORDER, *others][:count])


def _config(widths: Widths, layers: int, engram_rows: int, experts: int, keys: int) -> dict[str, Any]:
    """config.json of a slice, in the released dialect."""
    chosen = released_layers(layers)

    def among(released: tuple[int, ...]) -> list[int]:
        return [n for n, layer in enumerate(chosen) if layer in released]

    columns = 3 * widths.engram_n_heads
    if engram_rows < 4 * columns:
        raise ConfigError(f"{engram_rows} Engram rows: {columns} columns need at least {4 * columns}")
    engram_layers = among(tuple(layer for layer, _ in V41_FLASH.engram_rows))
    engram_vocab = engram_rows // columns
    primes = table_primes(len(engram_layers), 3, widths.engram_n_heads, engram_vocab)
    candidate_source = among((20,))
    text = {
        **vars(widths),
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "num_experts_per_tok": min(widths.num_experts_per_tok, experts),
        "compress_ratios": [V41_FLASH.ratios[layer] for layer in chosen],
        "kv_source_layer_ids": among(V41_FLASH.kv_sources),
        "index_source_layer_ids": among(V41_FLASH.index_sources),
        "candidate_source_layer_id": candidate_source[0] if candidate_source else -1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "hc_mult": V41_FLASH.streams,
        "engram_layer_ids": engram_layers,
        "engram_max_ngram_size": 4,
        "engram_vocab_size": engram_vocab,
        "engram_pad_token_id": PAD,
        "engram_compressed_vocab_size": keys,
        "engram_num_embeddings": [sum(layer) for layer in primes],
    }
    return in_released_dialect(text)


def in_released_dialect(text: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model with these keys, and what all models of the family have."""
    common = {
        "model_type": f"{MODEL_TYPE}_text",
        "num_nextn_predict_layers": 0,
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-20,
        "rope_theta": ROPE_THETA,
        "compress_rope_theta": 160000.0,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "expert_dtype": "fp4",
        },
        "text_config": common | text,
    }


def shards_of(
    specs: dict[str, TensorSpec], fill: Callable[[str, str, tuple[int, ...]], Fill]
) -> tuple[dict[str, RandomTensor], ...]:
    """Tensors by file: those outside layers, each layer, each Engram table. fill: what is in a tensor of this
    name, dtype and shape."""
    shards: dict[tuple[int, int], dict[str, RandomTensor]] = defaultdict(dict)
    for name, spec in specs.items():
        is_table = ".engram.embed." in name
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        dtype = "F32" if any(part in name for part in FLOAT32_PARTS) else spec.dtypes[0]
        shards[is_table, layer][name] = RandomTensor(dtype, spec.shape, fill(name, dtype, spec.shape))
    return tuple(shards[key] for key in sorted(shards))


def _fill(name: str, dtype: str, shape: tuple[int, ...], config: V41Config) -> Fill:
    """Content that keeps a forward's values near one: matrices by the width of what they read."""
    if dtype in ("I8", "F8_E4M3"):
        return Codes()
    if dtype == "F8_E8M0":
        if ".engram.embed." in name:
            return scales_for(1.0, e4m3_rms())
        is_expert = ".ffn.experts." in name
        return scales_for((32 * shape[1]) ** -0.5, FP4_RMS if is_expert else e4m3_rms())
    if name == "embed.weight":
        return Normal(0.0, 1.0)
    if name.endswith(("norm.weight", "_scale", "q_weight", "k_weight")):
        return Normal(1.0, 0.1)
    if len(shape) == 1:  # biases, bases, sinks
        return Normal(0.0, 0.01)
    return Normal(0.0, shape[1] ** -0.5)
