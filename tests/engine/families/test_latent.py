"""What is read of configs with latent attention, where the golden checkpoints do not show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.families.decoder.description import Description, Groups, Mla
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.weights import MlaWeights
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from engine.families.released import RELEASED, released_shape
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError, ConfigError
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.golden_families import PLENTY, golden_family, loaded
from tests.engine.families.test_decoder_refusals import with_changes


def described(config: dict[str, Any]) -> Description:
    checkpoint = Checkpoint(Path("model"), config["model_type"], config, {}, [])
    family = family_of(checkpoint)
    assert isinstance(family, DecoderFamily)
    return family.description(checkpoint)


@pytest.mark.parametrize(
    ("name", "scale"), [("deepseek-r1", 0.135234), ("deepseek-v2-lite", 0.114721), ("kimi-k2", 0.130861)]
)
def test_scores_are_scaled_by_the_square_of_yarns_factor(name: str, scale: float) -> None:
    attention = described(RELEASED[name]).layers[0].attention
    assert isinstance(attention, Mla)
    assert attention.scale == pytest.approx(scale, rel=1e-5)
    assert attention.rope.attention_factor == 1


def test_without_yarn_scores_are_scaled_by_the_heads_width_alone() -> None:
    attention = described(RELEASED["deepseek-r1"] | {"rope_scaling": None}).layers[0].attention
    assert isinstance(attention, Mla)
    assert attention.scale == pytest.approx(192**-0.5)


def test_a_group_of_v2_is_as_good_as_its_best_expert() -> None:
    grouped = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    experts = described(RELEASED["deepseek-v2-lite"] | grouped).experts
    assert experts is not None
    assert experts.router.groups == Groups(8, 3, best=1)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("deepseek-r1", 140_544), ("deepseek-v2-lite", 62_208), ("deepseek-v3.2", 171_776),
        ("glm-5.2", 4 * (78 * 576 + 21 * 128)),
    ],
)  # fmt: skip
def test_a_token_takes_a_latent_a_rotated_part_and_perhaps_an_index_key_in_each_layer(
    name: str, nbytes: int
) -> None:
    assert released_shape(name).kv_bytes(1, 1) == nbytes


def test_decoded_matrices_are_counted_in_memory_beside_the_file() -> None:
    of_layer = 128 * (128 + 128) * 512  # values, one byte each in the file
    scales = 4 * 256 * 4
    v3, v32, glm = (
        released_shape(name).layers[0].decoded for name in ("deepseek-r1", "deepseek-v3.2", "glm-5")
    )
    assert v3 == 3 * of_layer - scales
    assert v32 == of_layer - scales
    assert glm == 0


def test_where_scales_are_powers_of_two_decoded_matrices_are_bfloat16() -> None:
    for name, dtype in (("deepseek_v32", torch.bfloat16), ("deepseek_v3", torch.float32)):
        with loaded(golden_family(name).path, ReferenceKernels()) as model:
            attentions = [layer.attention for layer in model.weights.layers]
        assert {a.to_latent.dtype for a in attentions if isinstance(a, MlaWeights)} == {dtype}


def test_scales_that_are_not_what_the_config_says_are_refused() -> None:
    _, checkpoint = with_changes("deepseek_v3", {})
    quantization = dict(checkpoint.config["quantization_config"]) | {"scale_fmt": "ue8m0"}
    family, checkpoint = with_changes("deepseek_v3", {"quantization_config": quantization})
    with pytest.raises(CheckpointError, match=r"kv_b_proj.* no powers of two, although scale_fmt is 'ue8m0'"):
        family.load(checkpoint, ReferenceKernels(), PLENTY)


SCHEDULE = [0, 1, *range(2, 78, 4)]


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, SCHEDULE),
        ({"index_topk_freq": None, "index_skip_topk_offset": None}, list(range(78))),
        ({"index_topk_pattern": "FFS" * 26}, [n for n in range(78) if n % 3 < 2]),
        ({"indexer_types": ["full", "shared"] * 39, "index_topk_pattern": "F" * 78}, list(range(0, 78, 2))),
    ],
)
def test_layers_of_glm_5_have_indexers_as_their_config_says(changes: dict[str, Any], own: list[int]) -> None:
    layers = described(RELEASED["glm-5.2"] | changes).layers
    attentions = [layer.attention for layer in layers]
    assert [n for n, a in enumerate(attentions) if isinstance(a, Mla) and a.own_indexer is not None] == own


def test_an_indexer_turns_half_split_pairs_in_v32_and_adjacent_ones_in_glm_5() -> None:
    pairs = {}
    for name in ("deepseek-v3.2", "glm-5"):
        attention = described(RELEASED[name]).layers[0].attention
        assert isinstance(attention, Mla)
        assert attention.own_indexer is not None
        pairs[name] = attention.own_indexer.rope.pairs, attention.rope.pairs
    assert pairs == {"deepseek-v3.2": ("half", "adjacent"), "glm-5": ("adjacent", "adjacent")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.key_length": 100}, "attention.key_length is 100; .* supports only 80"),
        ({"attention.key_length_mla": 16}, "a head of 16 channels has no place for 16 that turn"),
        ({"expert_gating_func": 3}, "expert_gating_func is 3"),
        ({"nextn_predict_layers": 3}, "nextn_predict_layers is 3, expected fewer than the 3 layers"),
        ({"rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor is 2.0"),
        ({"expert_group_count": 4}, "9 experts are not a multiple of 4 groups"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    checkpoint = open_checkpoint(golden_family("gguf_deepseek2").path)
    config = dict(checkpoint.config) | {f"deepseek2.{key}": value for key, value in changes.items()}
    changed = Checkpoint(checkpoint.path, checkpoint.model_type, config, checkpoint.entries, [])
    with pytest.raises(ConfigError, match=message):
        family_of(changed).describe(changed)
