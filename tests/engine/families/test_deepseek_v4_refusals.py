"""A V4 checkpoint that is damaged, or asks for what is not computed, is refused with all that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.families.deepseek_v4.family import FAMILY
from engine.families.loader import open_checkpoint
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError, ConfigError
from quant.kernels.choice import choose
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.golden_families import (
    PLENTY,
    assert_close,
    family_path,
    golden_family,
    logits_in_chunks,
)


def with_changes(changes: dict[str, Any]) -> Checkpoint:
    """The golden checkpoint as if its config had these values; None removes a key."""
    checkpoint = open_checkpoint(family_path("deepseek_v4"))
    config = {key: value for key, value in (dict(checkpoint.config) | changes).items() if value is not None}
    return Checkpoint(checkpoint.path, checkpoint.model_type, config, checkpoint.entries, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 4, 128, 8, 128]}, r"compress_ratios is .*8.* supports only 0 or 4 or 128"),
        ({"compress_ratios": [0, 4]}, "expected a list with a number for each of 5 layers"),
        ({"compress_ratios": None}, "compress_ratios is None"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; the deepseek_v4 family supports only"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"gate_temp": 0.5}, "gate_temp is 0.5; the deepseek_v4 family does not support it"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types is"),
        ({"swiglu_limit": None}, "swiglu_limit is None, expected a positive number"),
        ({"num_hash_layers": 6}, "num_hash_layers is 6 of 5 layers"),
        ({"num_hidden_layers": 10**9}, "no model has more than"),
        ({"hc_sinkhorn_iters": 10**9}, "no model has more than 10000"),
        ({"o_groups": 3}, "o_groups 3 does not divide 4 heads"),
        ({"qk_rope_head_dim": 33}, "qk_rope_head_dim is 33, expected an even number up to 32"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.load(with_changes(changes), ReferenceKernels(), PLENTY)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("type", "linear", "rope_scaling.type is 'linear'; the deepseek_v4 family supports only 'yarn'"),
        ("mscale", 0.7, "rope_scaling.mscale is 0.7"),
        ("factor", 0, "rope_scaling.factor is 0, expected a positive number"),
        ("long_factor", [1.0], "rope_scaling.long_factor is"),
    ],
)
def test_positions_that_turn_otherwise_are_refused(key: str, value: object, message: str) -> None:
    rope = dict(open_checkpoint(family_path("deepseek_v4")).config["rope_scaling"]) | {key: value}
    with pytest.raises(ConfigError, match=message):
        FAMILY.describe(with_changes({"rope_scaling": rope}))


def test_all_that_is_wrong_is_named_at_once_in_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        FAMILY.describe(with_changes({"hidden_act": "gelu", "head_dim": "wide", "attn_gate": True}))
    said = str(caught.value)
    assert "hidden_act is 'gelu'" in said
    assert "head_dim is 'wide', expected a positive number" in said
    assert "attn_gate is True" in said
    assert "\n" not in said


def test_keys_of_drafts_and_of_training_change_nothing() -> None:
    FAMILY.describe(
        with_changes(
            {
                "dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_markov_rank": 256,
                "dspark_target_layer_ids": [40, 41, 42], "compress_ratios": [0, 4, 128, 4, 128, 0, 0, 0],
                "router_aux_loss_coef": 0.001, "some_gate": False,
            }
        )
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    target = tmp_path / "v4"
    shutil.copytree(family_path("deepseek_v4"), target)
    return target


def rewrite(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a checkpoint, in whichever files they are; None leaves one out."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in {index["weight_map"][name] for name in changes}:
        tensors = load_file(path / file)
        for name, value in changes.items():
            if index["weight_map"].get(name) == file:
                tensors.pop(name)
                if value is None:
                    del index["weight_map"][name]
                else:
                    tensors[name] = value
        save_file(tensors, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_everything_wrong_with_tensors_is_reported_at_once(copy: Path) -> None:
    rewrite(
        copy,
        {
            "layers.2.attn.compressor.ape": None,
            "layers.0.ffn.gate.tid2eid": torch.zeros(384, 3, dtype=torch.int64),
            "hc_head_fn": torch.zeros(4, 1024, dtype=torch.int32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        FAMILY.check(open_checkpoint(copy))
    said = str(caught.value)
    assert "missing tensor layers.2.attn.compressor.ape [128, 128]" in said
    assert "layers.0.ffn.gate.tid2eid: shape [384, 3], expected [384, 2]" in said
    assert "hc_head_fn: dtype I32, expected F32 or BF16 or F16" in said


@pytest.mark.parametrize("expert", [-1, 6])
def test_a_token_that_chooses_an_expert_that_is_not_there_is_refused(copy: Path, expert: int) -> None:
    table = torch.zeros(384, 2, dtype=torch.int64)
    table[7, 1] = expert
    rewrite(copy, {"layers.1.ffn.gate.tid2eid": table})
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.gate\.tid2eid names experts"):
        FAMILY.load(open_checkpoint(copy), ReferenceKernels(), PLENTY)


def test_a_token_may_choose_one_expert_twice(copy: Path) -> None:
    """Nothing says that a table's experts are distinct."""
    golden = golden_family("deepseek_v4")
    once = FAMILY.load(open_checkpoint(golden.path), ReferenceKernels(), PLENTY)
    name = "layers.0.ffn.gate.tid2eid"
    table = once.weights.layers[0].token_experts
    assert table is not None
    rewrite(copy, {name: table[:, :1].repeat(1, 2).contiguous()})
    twice = FAMILY.load(open_checkpoint(copy), ReferenceKernels(), PLENTY)
    ids = golden.ids(".1")
    found = logits_in_chunks(twice, ids, [len(ids)])
    assert bool(found.isfinite().all())
    assert (found - golden.logits(".1")).abs().max() > 1e-2
    native = FAMILY.load(open_checkpoint(copy), choose(), PLENTY)
    for sizes in ([len(ids)], [1]):
        assert_close(logits_in_chunks(native, ids, sizes), found)
