"""The configuration of a DeepSeek-V4.1 model, read from either dialect of config.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.families.streams.config import StreamConfig
from engine.families.streams.dspark import DSparkShape
from engine.layers.rope import YarnScaling
from quant.errors import ConfigError

# our name -> the other dialect's spelling
SPELLINGS = {
    "hidden_size": "dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_experts_per_tok": "n_activated_experts",
    "scoring_func": "score_func",
    "routed_scaling_factor": "route_scale",
    "qk_rope_head_dim": "rope_head_dim",
    "rms_norm_eps": "norm_eps",
    "sliding_window": "window_size",
    "kv_source_layer_ids": "kv_source_layers",
    "index_source_layer_ids": "index_source_layers",
    "candidate_source_layer_id": "candidate_source_layer",
    "engram_pad_token_id": "engram_pad_id",
}
# What `rope_scaling` may hold. The part of a head that is rotated follows from qk_rope_head_dim.
YARN_KEYS = {
    "type", "rope_type", "rope_theta", "compress_rope_theta", "partial_rotary_factor",
    "factor", "rope_factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "original_seq_len",
}  # fmt: skip

LARGEST = sys.float_info.max
# What is counted or computed one by one; a config that says more is damaged.
MOST = {
    "vocab_size": 100_000_000, "n_routed_experts": 100_000, "engram_max_ngram_size": 100,
    "engram_n_heads": 1_000, "hc_sinkhorn_iters": 10_000,
}  # fmt: skip


@dataclass(frozen=True)
class V41Config(StreamConfig):
    """And what V4.1 alone has; see the specification for the meaning of fields."""

    num_hidden_layers: int
    compress_ratios: tuple[int, ...]
    kv_source_layer_ids: tuple[int, ...]
    index_source_layer_ids: tuple[int, ...]
    candidate_source_layer_id: int
    candidate_topk_blocks: int
    candidate_block_size: int
    engram_layer_ids: tuple[int, ...]
    engram_max_ngram_size: int
    engram_vocab_size: int
    engram_n_heads: int
    engram_head_dim: int
    engram_pad_token_id: int
    engram_compressed_vocab_size: int
    engram_num_embeddings: tuple[int, ...]
    dspark: DSparkShape | None = None  # of draft stages
    is_first: bool = True  # of parts of a model: with its embedding
    is_last: bool = True  # with its head

    def check(self) -> None:
        """Raise ConfigError listing all inconsistencies between fields."""
        problems = self._contradictions()
        if problems:
            raise ConfigError("config.json is inconsistent:\n  " + "\n  ".join(problems))

    def kv_source_of(self, layer: int) -> int | None:
        """The layer whose compressed entries `layer` sees; None for window-only layers."""
        if self.compress_ratios[layer] == 0:
            return None
        return max(source for source in self.kv_source_layer_ids if source <= layer)

    @property
    def state_width(self) -> int:
        """Values that pass from layer to layer for a token: its streams, and the mix they are read with."""
        return self.hc_mult * (self.hidden_size + 1)

    @property
    def first_tail_layer(self) -> int:
        """From this layer on, layers look back on earlier tokens through their windows alone."""
        return max(self.kv_source_layer_ids, default=-1) + 1

    @property
    def has_tail(self) -> bool:
        """Whether there are such layers."""
        return self.first_tail_layer < self.num_hidden_layers

    def tail_of(self, layer: int) -> int:
        """Of how many last tokens a layer from `first_tail_layer` on must have the input, for the state after
        them to be exact (docs/architecture.md), without any to take back. The layer before these attends for
        as many, once it has made entries of all."""
        later = self.num_hidden_layers - 1 - layer
        return self.sliding_window + (self.sliding_window - 1) * later

    def _contradictions(self) -> list[str]:
        found = []
        layers = self.num_hidden_layers
        positive = (
            "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
            "head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok",
            "sliding_window", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings", "qk_rope_head_dim",
            *(("index_head_dim", "index_topk") if self.index_source_layer_ids else ()),
            "rms_norm_eps", "rope_theta", "compress_rope_theta", "routed_scaling_factor", "swiglu_limit",
            "hc_eps",
        )  # fmt: skip
        found += [
            f"{name} is {getattr(self, name)}, must be positive"
            for name in positive
            if getattr(self, name) <= 0
        ]
        narrowest = min([self.head_dim, *([self.index_head_dim] if self.index_source_layer_ids else [])])
        found += self.implausible(MOST, narrowest)
        if found:
            return found
        if len(self.compress_ratios) < layers:
            found.append(f"compress_ratios has {len(self.compress_ratios)} entries for {layers} layers")
            return found
        for name in ("kv_source_layer_ids", "index_source_layer_ids", "engram_layer_ids"):
            outside = [i for i in getattr(self, name) if not 0 <= i < layers]
            if outside:
                found.append(f"{name} names layers {outside} of a model with {layers}")
        for layer in self.kv_source_layer_ids + self.index_source_layer_ids:
            if 0 <= layer < layers and self.compress_ratios[layer] == 0:
                found.append(f"layer {layer} is a kv or index source, but its compress ratio is 0")
        for layer, ratio in enumerate(self.compress_ratios[:layers]):
            if ratio < 0:
                found.append(f"compress_ratios[{layer}] is {ratio}")
            if ratio == 0:
                continue
            sources = [s for s in self.kv_source_layer_ids if s <= layer]
            if not sources:
                found.append(f"layer {layer} reads compressed entries, but no kv source precedes it")
            elif self.compress_ratios[max(sources)] != ratio:
                found.append(f"layer {layer} has ratio {ratio}, but its source {max(sources)} has another")
            elif not any(max(sources) <= i <= layer for i in self.index_source_layer_ids):
                found.append(f"layer {layer} has no index source at or after its kv source {max(sources)}")
        candidate = self.candidate_source_layer_id
        if candidate >= 0:
            if candidate not in self.index_source_layer_ids:
                found.append(f"candidate_source_layer_id {candidate} is not an index source")
            if any(source > candidate for source in self.kv_source_layer_ids):
                found.append(f"a kv source follows the candidate source {candidate}")
            if self.candidate_topk_blocks < 1 or self.candidate_block_size < 1:
                found.append("candidate_topk_blocks and candidate_block_size must be positive")
        if self.num_attention_heads * self.head_dim % self.o_groups:
            found.append(f"o_groups {self.o_groups} does not divide the attention output")
        if self.num_experts_per_tok > self.n_routed_experts:
            found.append(f"top {self.num_experts_per_tok} of {self.n_routed_experts} experts")
        if len(self.engram_num_embeddings) != len(self.engram_layer_ids):
            found.append("engram_num_embeddings and engram_layer_ids differ in length")
        if self.engram_layer_ids and not 0 <= self.engram_pad_token_id < self.vocab_size:
            found.append(f"engram_pad_token_id {self.engram_pad_token_id} is outside the vocabulary")
        return found


def parse_config(raw: Mapping[str, Any]) -> V41Config:
    """The config from config.json: nested under `text_config` or flat, either spelling of keys.

    Raises ConfigError listing every missing key, every value of the wrong type, and settings that
    this family does not implement.
    """
    text = raw.get("text_config", raw)
    if not isinstance(text, Mapping):
        raise ConfigError("config.json: text_config is not an object")
    reader = _Reader(text, raw)
    config = V41Config(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=reader.integer("num_attention_heads"),
        head_dim=reader.integer("head_dim"),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim"),
        q_lora_rank=reader.integer("q_lora_rank"),
        o_groups=reader.integer("o_groups"),
        o_lora_rank=reader.integer("o_lora_rank"),
        rms_norm_eps=reader.number("rms_norm_eps"),
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.integer("n_shared_experts", 1),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
        swiglu_limit=reader.number("swiglu_limit"),
        sliding_window=reader.integer("sliding_window"),
        compress_ratios=reader.integers("compress_ratios"),
        kv_source_layer_ids=reader.integers("kv_source_layer_ids"),
        index_source_layer_ids=reader.integers("index_source_layer_ids"),
        candidate_source_layer_id=reader.integer("candidate_source_layer_id", -1),
        candidate_topk_blocks=reader.integer("candidate_topk_blocks", 0),
        candidate_block_size=reader.integer("candidate_block_size", 0),
        index_n_heads=reader.integer("index_n_heads"),
        index_head_dim=reader.integer("index_head_dim"),
        index_topk=reader.integer("index_topk"),
        rope_theta=reader.number("rope_theta"),
        compress_rope_theta=reader.number("compress_rope_theta"),
        yarn=reader.yarn(),
        max_position_embeddings=reader.integer("max_position_embeddings", 1_048_576),
        hc_mult=reader.integer("hc_mult"),
        hc_sinkhorn_iters=reader.integer("hc_sinkhorn_iters", 20),
        hc_eps=reader.number("hc_eps", 1e-6),
        engram_layer_ids=reader.integers("engram_layer_ids", ()),
        engram_max_ngram_size=reader.integer("engram_max_ngram_size", 1),
        engram_vocab_size=reader.integer("engram_vocab_size", 0),
        engram_n_heads=reader.integer("engram_n_heads", 0),
        engram_head_dim=reader.integer("engram_head_dim", 0),
        engram_pad_token_id=reader.integer("engram_pad_token_id", 0),
        engram_compressed_vocab_size=reader.integer("engram_compressed_vocab_size", 0),
        engram_num_embeddings=reader.integers("engram_num_embeddings", ()),
        bos_token_id=reader.integer("bos_token_id", 0),
        eos_token_ids=reader.integers("eos_token_id", (1,)),
    )
    config = replace(config, dspark=DSparkShape.of(text, config.num_hidden_layers, config.vocab_size))
    reader.require("scoring_func", "sqrtsoftplus")
    reader.require("norm_topk_prob", True)
    reader.require("hidden_act", "silu")
    reader.require("tie_word_embeddings", False)
    if reader.problems:
        raise ConfigError(
            "config.json is not supported by this model family:\n  " + "\n  ".join(reader.problems)
        )
    config.check()
    return config


_MISSING = object()


class _Reader:
    """Reads values from a config in either dialect and collects all errors."""

    def __init__(self, text: Mapping[str, Any], outer: Mapping[str, Any]) -> None:
        self.text = text
        self.outer = outer
        self.problems: list[str] = []

    def raw(self, name: str) -> Any:
        rope = self.text.get("rope_parameters")
        nested = rope if isinstance(rope, Mapping) and name.endswith("rope_theta") else {}
        for source in (self.text, self.outer, nested):
            for key in (name, SPELLINGS.get(name, name)):
                if source.get(key) is not None:
                    return source[key]
        return _MISSING

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw(name)
        if value is _MISSING and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self._complain(name, value, "an integer")
        return 0

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw(name)
        if value is _MISSING and default is not None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
            return float(value)
        self._complain(name, value, "a number")
        return 0.0

    def integers(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        value = self.raw(name)
        if value is _MISSING and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,)
        if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            return tuple(value)
        self._complain(name, value, "a list of integers")
        return ()

    def require(self, name: str, only: object) -> None:
        """An optional setting of which only one value is implemented."""
        value = self.raw(name)
        if value is not _MISSING and value != only:
            self.problems.append(f"{name} is {value!r}; only {only!r} is implemented")

    def yarn(self) -> YarnScaling | None:
        """YaRN settings from `rope_scaling`, `rope_parameters` or flat keys; None where there are none."""
        for key in ("rope_scaling", "rope_parameters"):
            value = self.raw(key)
            if value is not _MISSING and not isinstance(value, Mapping):
                self._complain(key, value, "an object")
        nested = next(
            (v for k in ("rope_scaling", "rope_parameters") if isinstance(v := self.raw(k), Mapping)), None
        )
        reader = self if nested is None else _Reader(nested, {})
        factor_key = (
            "rope_factor" if nested is None and reader.raw("rope_factor") is not _MISSING else "factor"
        )
        if nested is None and reader.raw(factor_key) is _MISSING:
            return None
        original = "original_max_position_embeddings"
        if reader.raw(original) is _MISSING:
            original = "original_seq_len"
        scaling = YarnScaling(
            factor=reader.number(factor_key),
            original_context=reader.integer(original),
            beta_fast=reader.number("beta_fast", 32),
            beta_slow=reader.number("beta_slow", 1),
        )
        if not reader.problems:
            reader.problems += [
                f"{name} is {value}, must be positive" for name, value in vars(scaling).items() if value <= 0
            ]
        if reader is not self:
            kind = nested.get("type", nested.get("rope_type", "yarn")) if nested is not None else "yarn"
            if kind != "yarn":
                reader.problems.append(f"type is {kind!r}; only 'yarn' is implemented")
            reader.problems += [
                f"{key} is {value!r}; it is not implemented"
                for key, value in reader.text.items()
                if key not in YARN_KEYS and value is not None and (key, value) != ("attention_factor", 1)
            ]
            self.problems += [f"rope_scaling: {problem}" for problem in reader.problems]
        return scaling

    def _complain(self, name: str, value: object, wanted: str) -> None:
        if value is _MISSING:
            other = SPELLINGS.get(name)
            self.problems.append(f"{name} is missing" + (f" (also looked for {other})" if other else ""))
        else:
            self.problems.append(f"{name} is {value!r}, expected {wanted}")
