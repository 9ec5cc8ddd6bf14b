"""A config that only looks like one of a decoder family is refused, with all that is wrong named at once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.families.base import Family
from engine.families.decoder.family import DecoderFamily
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.budget import MemoryBudget
from quant.errors import CheckpointError, ConfigError, LociError
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.golden_families import SAFETENSORS, family_path


def with_changes(name: str, changes: dict[str, Any]) -> tuple[Family, Checkpoint]:
    """A golden checkpoint as if its config, or the part about text, had these values; None removes a key."""
    checkpoint = open_checkpoint(family_path(name))
    config = dict(checkpoint.config)
    whole = dict(config.get("text_config", config)) | changes
    text = {key: value for key, value in whole.items() if value is not None}
    config = config | {"text_config": text} if "text_config" in config else text
    changed = Checkpoint(checkpoint.path, checkpoint.model_type, config, checkpoint.entries, [])
    return family_of(changed), changed


def refusal(name: str, changes: dict[str, Any]) -> str:
    family, checkpoint = with_changes(name, changes)
    with pytest.raises(ConfigError) as caught:
        family.describe(checkpoint)
    with pytest.raises(ConfigError):
        family.load(checkpoint, ReferenceKernels(), MemoryBudget(1 << 30))
    return str(caught.value)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_several_things_that_are_not_computed_are_named_in_one_error(name: str) -> None:
    said = refusal(
        name,
        {
            "hidden_act": "gelu",
            "rms_norm_eps": "small",
            "final_logit_softcapping": 30.0,
            "rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]},
        },
    )

    assert f"hidden_act is 'gelu'; the {name} family supports only 'silu'" in said
    assert "rms_norm_eps is 'small', expected a positive number" in said
    assert f"final_logit_softcapping is 30.0; the {name} family does not support it" in said
    assert "rope scaling 'longrope' is not supported" in said
    assert "\n" not in said


@pytest.mark.parametrize("name", SAFETENSORS)
def test_keys_that_are_switched_off_or_change_nothing_are_passed_over(name: str) -> None:
    family, checkpoint = with_changes(
        name,
        {
            "attn_logit_cap": None,
            "use_gate": False,
            "extra_norms": [],
            "transformers_version": "9",
            "top_p": 1,
        },
    )
    family.describe(checkpoint)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_moe", {"num_experts": None}, "num_experts is None, expected a positive number"),
        ("qwen3_moe", {"norm_topk_prob": 2}, "norm_topk_prob is 2, expected true or false"),
        ("qwen3_moe", {"num_key_value_heads": 3}, "4 query heads are not a multiple of 3 key-value heads"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("mixtral", {"attention_bias": True}, "attention_bias is True"),
        ("olmoe", {"attention_bias": True}, "attention_bias is True"),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv is -1, expected a positive number"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling is 0, expected a positive number"),
        ("granitemoe", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; .* supports only 'sigmoid'"),
        ("glm4_moe", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("glm4_moe", {"n_group": 5}, "12 experts are not a multiple of 5 groups"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; .* supports only 'softmax'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is None, expected a positive number"),
        (
            "deepseek_v3",
            {"index_topk": 2048},
            "index_topk is 2048; the deepseek_v3 family does not support it",
        ),
        ("deepseek_v32", {"index_topk": None}, "index_topk is None, expected a positive number"),
        ("deepseek_v32", {"index_head_dim": 16}, "index_head_dim is 16, expected at least .*, 32"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank is None, expected a number"),
        ("deepseek_v32", {"index_topk_freq": 4}, "index_topk_freq is 4; the deepseek_v32 family does not"),
        ("glm_moe_dsa", {"moe_router_dtype": "bfloat16"}, "moe_router_dtype is 'bfloat16'"),
        ("glm_moe_dsa", {"mlp_layer_types": ["sparse"] * 5}, "mlp_layer_types is .*, expected 5 as"),
        ("glm_moe_dsa", {"layer_types": ["full_attention"] * 5}, "layer_types is .*, expected 5 as"),
        ("glm_moe_dsa", {"indexer_types": ["full"] * 4}, "indexer_types is .*, expected .* for 5 layers"),
        ("glm_moe_dsa", {"indexer_types": ["shared"] + ["full"] * 4}, "indexer_types is .* 'full' first"),
        ("glm_moe_dsa", {"indexer_types": ["full", "top", "full", "full", "full"]}, "indexer_types is"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias is False"),
        (
            "gpt_oss",
            {"layer_types": ["full_attention"] * 3},
            "layer_types is .*, expected 4 of sliding_attention, full",
        ),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, "layer_types is"),
        # What a reader might take as 1 or as nothing, and `transformers` does not.
        ("gpt_oss", {"rope_scaling": None}, "rope_scaling is missing"),
        ("deepseek_v3", {"routed_scaling_factor": None}, "routed_scaling_factor is None"),
        ("deepseek_v3", {"n_group": None}, "n_group is None"),
        ("minimax_m2", {"rotary_dim": None}, "rotary_dim is None"),
        # What cannot be.
        ("qwen3_moe", {"num_experts_per_tok": 13}, "a token uses 13 experts, but there are only 12"),
        ("deepseek_v3", {"topk_group": 5}, "5 groups of experts are kept, but there are only 4"),
        ("deepseek_v3", {"topk_group": 1}, "a token uses 3 experts, but 1 groups have only 2"),
        ("deepseek_v3", {"n_group": 8}, "groups are judged by 2 experts, but have only 1"),
        ("mixtral", {"num_local_experts": 10**9}, r"3000000000 experts in all; no model has more than"),
        # What looks like another kind of model.
        ("qwen3_moe", {"is_causal": False}, "is_causal is False; the qwen3_moe family does not support it"),
        (
            "qwen3_moe",
            {"vision_config": {"depth": 27}},
            "vision_config is {'depth': 27}; the qwen3_moe family",
        ),
        ("glm4_moe", {"rope_parameters": {"mrope_section": [8, 12, 12]}}, "rope_scaling has mrope_section"),
        ("mixtral", {"num_experts_shared": 1}, "num_experts_shared is 1"),
        ("granitemoe", {"layer_types": ["mamba"] * 3}, "layer_types is"),
        ("qwen3_next", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "3 value heads are not a multiple of 2 key heads"),
        ("qwen3_next", {"linear_key_head_dim": 24}, "linear_key_head_dim is 24, expected a multiple of 16"),
        ("qwen3_next", {"full_attention_interval": 9}, "no layer has full attention"),
        ("qwen3_5_moe", {"attn_output_gate": False}, "text_config.attn_output_gate is False"),
        ("qwen3_5_moe", {"layer_types": ["mamba"] * 4}, "layer_types is .*, expected 4 of linear_attention"),
        ("qwen3_5_moe", {"tie_word_embeddings": True}, "tie_word_embeddings disagree"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(name, changes))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_missing_misshapen_and_unknown_tensors_are_named_before_anything_large_is_read(
    name: str, tmp_path: Path
) -> None:
    copy = tmp_path / name
    shutil.copytree(family_path(name), copy)
    (copy / "model.safetensors.index.json").unlink()
    tensors: dict[str, torch.Tensor] = {}
    for file in copy.glob("model-*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    missing = next(key for key in tensors if re.search(r"layers\.1\..*\.(o|out)_proj\.weight$", key))
    layer = missing.partition("layers.")[0] + "layers.0."
    del tensors[missing]
    tensors[f"{layer}input_layernorm.weight"] = torch.zeros(8, 8)
    tensors[f"{layer}post_feedforward_layernorm.weight"] = torch.zeros(8)
    save_file(tensors, copy / "model.safetensors")
    checkpoint = open_checkpoint(copy)

    with pytest.raises(CheckpointError) as caught:
        family_of(checkpoint).check(checkpoint)

    for problem in (
        f"missing tensor {missing}",
        f"{layer}input_layernorm.weight: shape [8, 8], expected",
        f"unexpected tensor {layer}post_feedforward_layernorm.weight [8]",
    ):
        assert problem in str(caught.value)


def test_a_layer_less_than_the_config_says_is_missed() -> None:
    family, checkpoint = with_changes("qwen3_moe", {"num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.3\.input_layernorm\.weight"):
        family.check(checkpoint)


def test_experts_of_a_dtype_that_no_format_has_are_named() -> None:
    family, checkpoint = with_changes("qwen3_moe", {})
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    entries = dict(checkpoint.entries)
    entries[name] = type(entries[name])(**{**vars(entries[name]), "dtype": "F8_E5M2"})
    changed = Checkpoint(checkpoint.path, checkpoint.model_type, checkpoint.config, entries, [])
    family.describe(changed)
    with pytest.raises(LociError, match=r"up_proj\.weight is F8_E5M2 without scales"):
        family.check(changed)


def test_draft_layers_are_met_and_not_counted() -> None:
    checkpoint = open_checkpoint(family_path("glm4_moe"))
    draft = [name for name in checkpoint.entries if name.startswith("model.layers.3.")]
    assert draft
    family = family_of(checkpoint)
    family.check(checkpoint)
    used = sum(component.nbytes for component in family.describe(checkpoint)[1])
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    assert used == total - sum(checkpoint.entries[name].nbytes for name in draft)


@pytest.mark.parametrize(
    ("name", "key"),
    [("mixtral", "rope_theta"), ("gpt_oss", "rope_theta"), ("glm4_moe", "partial_rotary_factor")],
)
def test_a_key_that_is_left_out_means_what_transformers_takes_for_it(name: str, key: str) -> None:
    family, whole = with_changes(name, {})
    assert isinstance(family, DecoderFamily)
    _, without = with_changes(name, {key: None})
    assert family.description(without) == family.description(whole)


def test_how_weights_are_packed_is_refused_along_with_everything_else() -> None:
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
    said = refusal("qwen3_moe", {"hidden_act": "relu", "quantization_config": packed})
    assert "hidden_act is 'relu'" in said
    assert "GPTQ with act-order (desc_act true) is not supported" in said
    assert "\n" not in said


def test_what_is_wrong_with_every_matrix_is_not_said_of_every_matrix() -> None:
    checkpoint = open_checkpoint(family_path("qwen3_moe_fp8"))
    config = dict(checkpoint.config) | {"quantization_config": {"quant_method": "fp8"}}
    changed = Checkpoint(checkpoint.path, checkpoint.model_type, config, checkpoint.entries, [])
    with pytest.raises(CheckpointError) as caught:
        family_of(changed).check(changed)
    first, *problems = str(caught.value).splitlines()
    assert first == f"{checkpoint.path}: 66 problem(s) in the checkpoint; nothing was loaded:"
    assert len(problems) == 41
    assert "FP8 is read with one scale for each 32x32 tile" in problems[0]
    assert problems[-1].strip() == "... and 26 more"


def test_tensors_of_a_vision_tower_are_named(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(family_path("mixtral"), copy)
    (copy / "model.safetensors.index.json").unlink()
    save_file(
        {"model.visual.blocks.0.attn.qkv.weight": torch.zeros(8, 8)},
        copy / "model-00003-of-00003.safetensors",
    )
    for number in (1, 2):
        (copy / f"model-0000{number}-of-00002.safetensors").rename(
            copy / f"model-0000{number}-of-00003.safetensors"
        )
    checkpoint = open_checkpoint(copy)
    with pytest.raises(
        CheckpointError, match=r"unexpected tensor model\.visual\.blocks\.0\.attn\.qkv\.weight \[8, 8\]"
    ):
        family_of(checkpoint).check(checkpoint)
