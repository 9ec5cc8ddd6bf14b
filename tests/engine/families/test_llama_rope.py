"""Stretched rotary embeddings of the llama family: computed as others do, or refused, never passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.families.base import Batch
from engine.families.llama import FAMILY, describe_llama
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.gguf_files import open_gguf
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.errors import CheckpointError, ConfigError
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.tiny_llama import VOCAB, tiny_values, write_gguf, write_safetensors

IDS = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()
UNSCALED = [10000.0 ** (-n / 8) for n in range(8)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Frequencies and attention factors that transformers 5.24 computes for heads of 16 channels.
LLAMA3_FREQUENCIES = [1.0, 0.09584, 0.0125, 0.0039528, 0.00125, 0.0003953, 0.000125, 3.95e-05]
TRANSFORMERS: list[tuple[dict[str, Any], list[float], float]] = [
    ({}, UNSCALED, 1.0),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, [f / 4 for f in UNSCALED], 1.0),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, UNSCALED, 1.0),
    ({"rope_scaling": LLAMA3}, LLAMA3_FREQUENCIES, 1.0),
    ({"rope_parameters": LLAMA3}, LLAMA3_FREQUENCIES, 1.0),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}, "rope_theta": None},
        [0.3333333, 0.1532878, 0.0704914, 0.0324164, 0.0149071, 0.0068552, 0.0031525, 0.0014497],
        1.0,
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}, "rope_theta": 10000.0},
        [1.0, 0.5156693, 0.2659148, 0.1371241, 0.0707107, 0.0364633, 0.018803, 0.0096961],
        1.0,
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        [1.0, 0.0790569, 0.025, 0.0079057, 0.0025, 0.0007906, 0.00025, 7.91e-05],
        1.138629436111989,
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
        [1.0, 0.0790569, 0.025, 0.0079057, 0.0025, 0.0007906, 0.00025, 7.91e-05],
        1.138629436111989,
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 8,
                "beta_slow": 2,
                "attention_factor": 1.3,
            }
        },
        [1.0, 0.1976424, 0.025, 0.0079057, 0.0025, 0.0007906, 0.00025, 7.91e-05],
        1.3,
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 0.7,
                "mscale_all_dim": 1.1,
            },
            "rope_theta": 500000.0,
        },
        [1.0, 0.1939228, 0.0253841, 0.0025524, 3.54e-05, 6.9e-06, 1.3e-06, 3e-07],
        0.8950365488551619,
    ),
]


def in_gguf(tmp_path: Path, metadata: dict[str, object], factors: list[float] | None = None) -> Checkpoint:
    values = tiny_values()
    if factors is not None:
        values["rope_freqs.weight"] = np.array(factors, dtype=np.float32)
    return open_gguf(write_gguf(tmp_path / "m.gguf", values, metadata=metadata))


def in_directory(tmp_path: Path, config: dict[str, Any]) -> Checkpoint:
    return open_safetensors(write_safetensors(tmp_path / "m", tiny_values(), config))


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = FAMILY.load(checkpoint, ReferenceKernels(), MemoryBudget(1 << 30))
    return model.forward(Batch.of([(0, 0, IDS)], all_logits=True), model.new_cache(1, len(IDS)))


@pytest.mark.parametrize(("config", "frequencies", "attention_factor"), TRANSFORMERS)
def test_frequencies_are_those_of_transformers(
    tmp_path: Path, config: dict[str, Any], frequencies: list[float], attention_factor: float
) -> None:
    rope = describe_llama(in_directory(tmp_path, config)).rope

    expected = torch.tensor(frequencies, dtype=torch.float64)
    torch.testing.assert_close(rope.frequencies, expected, atol=6e-8, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor)


@pytest.mark.parametrize(
    ("metadata", "config"),
    [
        ({"llama.rope.scale_linear": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"llama.rope.scaling.factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0},
            {"type": "linear", "factor": 4.0},
        ),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 16,
                "llama.rope.scaling.attn_factor": 1.5,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.5 * 1.138629436111989,
            },
        ),
    ],
)
def test_a_gguf_file_is_stretched_like_the_directory_that_it_was_made_of(
    tmp_path: Path, metadata: dict[str, object], config: dict[str, Any] | None
) -> None:
    expected = logits(in_directory(tmp_path, {"rope_scaling": config}))

    torch.testing.assert_close(logits(in_gguf(tmp_path, metadata)), expected, atol=4e-5, rtol=0)


def test_a_stretched_model_answers_otherwise(tmp_path: Path) -> None:
    plain = logits(in_directory(tmp_path, {}))

    stretched = logits(in_gguf(tmp_path, {"llama.rope.scale_linear": 4.0}))

    assert (stretched - plain).abs().max() > 1


def test_frequencies_are_divided_by_the_factors_in_a_gguf_file(tmp_path: Path) -> None:
    factors = [plain / scaled for plain, scaled in zip(UNSCALED, LLAMA3_FREQUENCIES, strict=True)]
    expected = logits(in_directory(tmp_path, {"rope_scaling": LLAMA3}))

    torch.testing.assert_close(logits(in_gguf(tmp_path, {}, factors)), expected, atol=1e-3, rtol=0)


def test_a_tensor_of_frequency_factors_must_fit_the_heads(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight: shape \[5\], expected \[8\]"):
        logits(in_gguf(tmp_path, {}, [1.0] * 5))


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_frequency_factors_must_be_positive_numbers(tmp_path: Path, factor: float) -> None:
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has values that are not positive"):
        logits(in_gguf(tmp_path, {}, [1.0] * 7 + [factor]))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"llama.rope.scaling.factor": -2.0}, "llama.rope.scaling.factor is -2.0, expected a positive"),
        ({"llama.rope.scale_linear": "four"}, "llama.rope.scale_linear is 'four', expected a positive"),
        ({"llama.rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast is 8.0; .* supports only 32.0"),
        ({"llama.rope.scaling.alpha": 2.0}, "llama.rope.scaling.alpha is 2.0; .* does not support it"),
        ({"llama.rope.freq_base_swa": 5.0}, "llama.rope.freq_base_swa is 5.0; .* does not support it"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base is inf, expected a positive number"),
    ],
)
def test_a_gguf_file_stretched_otherwise_is_refused(
    tmp_path: Path, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.describe(in_gguf(tmp_path, metadata))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope scaling 'longrope' is not supp"),
        ({"rope_scaling": {"factor": 8.0}}, "has factor, which rope scaling 'default' does not use"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is None, expected a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 4, "alpha": 2}}, "rope_scaling has alpha, which"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "has full_attention, which"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; the llama family supports only 1"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"rotary_dim": 8}, "rotary_dim is 8"),
    ],
)
def test_a_directory_stretched_otherwise_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILY.describe(in_directory(tmp_path, config))
