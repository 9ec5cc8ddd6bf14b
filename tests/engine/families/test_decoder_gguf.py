"""Checkpoints converted to GGUF as llama.cpp does it answer like the safetensors that they were made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.families.decoder.forward import Decoder
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import ConfigError
from quant.kernels.choice import choose
from tests.engine.families.as_gguf import ARCHITECTURES, write_as_gguf
from tests.engine.families.golden_families import (
    PLENTY,
    SEQUENCES,
    assert_close,
    golden_family,
    greedy_ids,
    loaded,
    logits_in_chunks,
)
from tests.engine.families.llama_cpp_logits import next_log_probabilities
from tests.engine.families.test_decoder_refusals import with_changes

# What GGUF has no key for is left out of the model: Mixtral's window, which its releases do not have either,
# counts from its 25th token on; OLMoE's clip, as in its release.
WITHIN_WINDOW = {"mixtral": 24}
# llama.cpp needs index queries of 64 channels or more, and stops the process where they have fewer.
NOT_IN_LLAMA_CPP = ("glm_moe_dsa",)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A golden checkpoint by name, as a GGUF file that is written once."""
    folder = tmp_path_factory.mktemp("gguf")
    return cache(lambda name: write_as_gguf(golden_family(name).path, folder / f"{name}.gguf"))


@pytest.fixture(params=ARCHITECTURES)
def converted(request: pytest.FixtureRequest, file_of: Callable[[str], Path]) -> tuple[str, Path]:
    """A golden checkpoint's name, and it as a GGUF file."""
    return request.param, file_of(request.param)


def prompts(name: str) -> list[list[int]]:
    return [golden_family(name).ids(which)[: WITHIN_WINDOW.get(name)] for which in SEQUENCES]


def expected_logits(name: str) -> list[torch.Tensor]:
    """At every position of every prompt."""
    golden = golden_family(name)
    if name != "olmoe":
        return [golden.logits(which)[: WITHIN_WINDOW.get(name)] for which in SEQUENCES]
    family, checkpoint = with_changes(name, {"clip_qkv": None})
    model = family.load(checkpoint, choose(), PLENTY)
    assert isinstance(model, Decoder)
    try:
        return [logits_in_chunks(model, ids, [64]) for ids in prompts(name)]
    finally:
        model.close()


def test_the_logits_are_those_of_the_checkpoint_it_was_made_of(converted: tuple[str, Path]) -> None:
    name, file = converted
    with loaded(file, choose()) as model:
        for ids, expected in zip(prompts(name), expected_logits(name), strict=True):
            for size in (7, 64):
                assert_close(logits_in_chunks(model, ids, [size]), expected)
        if name not in ("mixtral", "olmoe"):
            golden = golden_family(name)
            assert greedy_ids(model, golden.ids(), 16) == golden.greedy()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed (extra `bench`)")
def test_llama_cpp_reads_the_same_in_the_same_file(converted: tuple[str, Path]) -> None:
    name, file = converted
    if name in NOT_IN_LLAMA_CPP:
        pytest.skip("llama.cpp does not run a model as small as this one")
    theirs = torch.tensor(next_log_probabilities(file, prompts(name)))
    ours = torch.stack([logits[-1].log_softmax(-1) for logits in expected_logits(name)])
    assert_close(theirs, ours)


def test_everything_of_the_file_is_described_and_counted(converted: tuple[str, Path]) -> None:
    name, file = converted
    checkpoint = open_checkpoint(file)
    family = family_of(checkpoint)
    family.check(checkpoint)
    layers = open_checkpoint(golden_family(name).path).config["num_hidden_layers"]
    drafts = [entry for entry in checkpoint.entries if entry.startswith(f"blk.{layers}.")]
    assert bool(drafts) == name.startswith("glm")
    counted = sum(component.nbytes for component in family.describe(checkpoint)[1])
    total = sum(entry.nbytes for entry in checkpoint.entries.values())
    assert counted == total - sum(checkpoint.entries[draft].nbytes for draft in drafts)


REFUSED = [
    ("deepseek_v32", {"attention.indexer.top_k": None}, "attention.indexer.top_k is None"),
    ("deepseek_v32", {"attention.indexer.key_length": 16}, "attention.indexer.key_length is 16, .* least 32"),
    ("deepseek_v32", {"attention.indexer.top_k_frequency": 4}, "attention.indexer.top_k_frequency is 4"),
    ("deepseek_v32", {"expert_gating_func": 1}, "deepseek32.expert_gating_func is 1; .* supports only 2"),
    (
        "glm_moe_dsa",
        {"attention.indexer.types": [True] * 5},
        "indexer.types is .*, but the file has indexers",
    ),
    ("glm_moe_dsa", {"nextn_predict_layers": None}, "indexer.types is .*, but the file has indexers"),
    ("glm4_moe", {"expert_gating_func": 1}, "glm4moe.expert_gating_func is 1; .* supports only 2"),
    ("glm4_moe", {"expert_group_count": 4}, "glm4moe.expert_group_count is 4; .* supports only 1"),
    ("glm4_moe", {"nextn_predict_layers": 4}, "nextn_predict_layers is 4, expected fewer than the 4 layers"),
    ("glm4_moe", {"rope.dimension_sections": [8, 4, 4, 0]}, "glm4moe.rope.dimension_sections is"),
    (
        "granitemoe",
        {"rope.scaling.finetuned": False},
        "rope.scaling.finetuned is False; .* supports only True",
    ),
    ("granitemoe", {"expert_shared_feed_forward_length": 64}, "expert_shared_feed_forward_length is 64"),
    ("granitemoe", {"logit_scale": None}, "granitemoe.logit_scale is None, expected a positive number"),
    ("minimax_m2", {"expert_gating_func": None}, "expert_gating_func is None; .* supports only 2"),
    ("minimax_m2", {"expert_weights_scale": 2.0}, "expert_weights_scale is 2.0"),
    ("mixtral", {"attention.sliding_window": 24}, "llama.attention.sliding_window is 24"),
    ("mixtral", {"expert_feed_forward_length": 64}, "llama.expert_feed_forward_length is 64"),
    ("glm4_moe", {"attention.causal": False}, "glm4moe.attention.causal is False"),
    ("minimax_m2", {"expert_used_count": 7}, "a token uses 7 experts, but there are only 6"),
    ("olmoe", {"attention.clamp_kqv": 1.5}, "olmoe.attention.clamp_kqv is 1.5"),
    ("olmoe", {"feed_forward_length": 64, "expert_feed_forward_length": 32}, "feed_forward_length is 64"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_metadata_that_is_not_computed_is_refused(
    name: str, changes: dict[str, Any], message: str, file_of: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(file_of(name))
    prefixed = {f"{checkpoint.model_type}.{key}": value for key, value in changes.items()}
    config = {key: v for key, v in (dict(checkpoint.config) | prefixed).items() if v is not None}
    changed = Checkpoint(checkpoint.path, checkpoint.model_type, config, checkpoint.entries, [])
    with pytest.raises(ConfigError, match=message):
        family_of(changed).check(changed)
