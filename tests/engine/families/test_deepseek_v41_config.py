"""Configs that are wrong are refused with everything that is wrong, and why."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from engine.families.deepseek_v41.config import parse_config
from quant.errors import ConfigError
from tests.conftest import golden_path

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def text() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((golden_path("v41-a") / "config.json").read_text())["text_config"]
    return config


def test_settings_that_change_nothing_are_taken(text: dict[str, Any]) -> None:
    plain = parse_config(text | {"rope_scaling": YARN})
    text["rope_scaling"] = YARN | {"attention_factor": 1.0, "mscale": None, "beta_fast": 32}

    assert parse_config(text) == plain


def refusal(text: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return str(caught.value)


def test_all_missing_keys_are_named_at_once(text: dict[str, Any]) -> None:
    del text["hidden_size"], text["index_topk"], text["swiglu_limit"]
    message = refusal(text)
    assert "hidden_size is missing (also looked for dim)" in message
    assert "index_topk is missing" in message
    assert "swiglu_limit is missing" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", "8", "num_hidden_layers is '8', expected an integer"),
        ("num_hidden_layers", True, "num_hidden_layers is True, expected an integer"),
        ("rope_theta", None, "rope_theta is missing"),
        ("compress_ratios", 7, "compress_ratios has 1 entries for 8 layers"),
        ("compress_ratios", [0, 2, "x"], "expected a list of integers"),
        ("hidden_size", 0, "hidden_size is 0, must be positive"),
        ("rope_theta", -1, "rope_theta is -1.0, must be positive"),
        ("rms_norm_eps", math.nan, "rms_norm_eps is nan, expected a number"),
        ("swiglu_limit", math.inf, "swiglu_limit is inf, expected a number"),
        ("rope_theta", 10**400, ", expected a number"),
        ("index_topk", 0, "index_topk is 0, must be positive"),
        ("qk_rope_head_dim", 2**40, "qk_rope_head_dim is 1099511627776, expected an even number up to"),
        ("rope_scaling", "yarn", "rope_scaling is 'yarn', expected an object"),
        ("n_routed_experts", 2**40, "no model has more than"),
        ("engram_n_heads", 2**40, "no model has more than"),
        ("vocab_size", 2**40, "no model has more than"),
        ("scoring_func", "sigmoid", "only 'sqrtsoftplus' is implemented"),
        ("tie_word_embeddings", True, "only False is implemented"),
        ("kv_source_layer_ids", [1, 9], "kv_source_layer_ids names layers [9] of a model with 8"),
        ("kv_source_layer_ids", [4], "no kv source precedes it"),
        ("kv_source_layer_ids", [1], "layer 4 has ratio 1, but its source 1 has another"),
        ("index_source_layer_ids", [5], "has no index source at or after its kv source"),
        ("candidate_source_layer_id", 6, "candidate_source_layer_id 6 is not an index source"),
        ("candidate_source_layer_id", 1, "a kv source follows the candidate source"),
        ("num_experts_per_tok", 99, "top 99 of 16 experts"),
        ("engram_num_embeddings", [1], "differ in length"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "only 'yarn' is implemented"),
        ("rope_scaling", YARN | {"mscale": 0.7}, "rope_scaling: mscale is 0.7; it is not implemented"),
        ("rope_scaling", YARN | {"attention_factor": 1.2}, "attention_factor is 1.2; it is not implemented"),
        ("rope_scaling", YARN | {"factor": 0}, "rope_scaling: factor is 0.0, must be positive"),
        ("rope_scaling", YARN | {"beta_slow": -1}, "rope_scaling: beta_slow is -1.0, must be positive"),
    ],
)
def test_a_wrong_value_is_named(text: dict[str, Any], key: str, value: object, message: str) -> None:
    text[key] = value
    assert message in refusal(text)
