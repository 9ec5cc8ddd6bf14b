"""Released configurations weigh what was published: parameters, and bytes where these are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from engine.families.decoder.config_only import config_shape
from engine.families.loader import open_checkpoint
from engine.families.released import NAMES, RELEASED, released_shape
from engine.families.shapes import shape_of
from memory.planner.shape import ModelShape
from quant.errors import ConfigError
from tests.engine.families.golden_families import family_path
from tests.server.harness import invoke

# Parameters as the Hub counts them in the safetensors files (its API's `safetensors.total`); `total_size` of
# model.safetensors.index.json, or the sum of the tensors' bytes in the headers where it says so. All of them
# were found quoted for these repositories by others; the Hub itself was not asked.
PUBLISHED = {
    "deepseek-v2": (235_741_434_880, None),
    "deepseek-v2-lite": (15_706_484_224, 31_412_968_448),
    "gpt-oss-120b": (116_829_156_672, 65_248_815_744),  # bytes: of the tensors
    "gpt-oss-20b": (20_914_757_184, 13_761_264_768),
    "granite-3.1-1b-a400m": (1_334_628_352, None),  # counted in the loaded model, not in files
    "granite-3.1-3b-a800m": (3_298_793_472, None),  # of granite-guardian-3.2-3b-a800m, which was made of it
    "kimi-k2": (1_026_408_235_864, None),  # -Instruct; -Base is counted with its FP8 scales
    "kimi-k2-thinking": (1_026_408_240_256, None),
    "minimax-m2": (228_689_764_864, None),
    "mixtral-8x22b": (140_620_634_112, 281_241_268_224),
    "mixtral-8x7b": (46_702_792_704, 93_405_585_408),
    "moonlight-16b-a3b": (15_960_111_936, None),
    "olmoe-1b-7b": (6_919_161_856, 13_838_323_712),
    "qwen3-235b-a22b": (235_093_634_560, 470_187_269_120),
    "qwen3-30b-a3b": (30_532_122_624, 61_064_245_248),
    "qwen3-coder-480b-a35b": (480_154_875_392, None),
}
FP8_SCALES = 41_540_496  # which the Hub counts for V3 and V3.1, and not for R1
# With a draft layer behind the last one, which is ignored here.
WITH_DRAFT = {
    "deepseek-r1": 684_489_845_504,
    "deepseek-v3": 684_531_386_000 - FP8_SCALES,
    "deepseek-v3.1": 684_531_386_000 - FP8_SCALES,
    "deepseek-v3.2": 685_355_329_792,
    "glm-4.5": 358_337_791_296,
    "glm-4.5-air": 110_468_824_832,
    "glm-4.6": 356_785_898_816 + 2 * 151_552 * 5120,  # its draft layer has no embedding and head of its own
    "glm-4.7": 358_337_791_296,
}
# The same, where the draft layer's embedding and head are the model's.
WITH_PARTS_OF_A_DRAFT = {"glm-5": 753_864_139_008, "glm-5.2": 753_329_940_480}
# With a draft layer that has no embedding of its own, and the last three with a tower for images: exactly.
WITH_DRAFT_AND_TOWER = {
    "qwen3-next-80b-a3b": 81_324_862_720,
    "qwen3.5-35b-a3b": 35_951_822_704,
    "qwen3.5-122b-a10b": 125_086_497_008,
    "qwen3.5-397b-a17b": 403_397_928_944,
}
# Without it: INTELLECT-3 of PrimeIntellect was trained from GLM-4.5-Air and is published like that.
WITHOUT_DRAFT = {"glm-4.5-air": 106_852_251_264}

V4 = {"deepseek-v4-flash", "deepseek-v4-pro"}  # test_deepseek_v4_released.py


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_bytes_are_the_published_ones(name: str) -> None:
    parameters, nbytes = PUBLISHED[name]
    shape = released_shape(name)
    assert shape.parameters == pytest.approx(parameters, rel=1e-6)
    assert nbytes is None or shape.nbytes == nbytes


@pytest.mark.parametrize("name", WITH_DRAFT)
def test_parameters_are_the_published_ones_less_the_draft_layer(name: str) -> None:
    shape = released_shape(name)
    assert shape.parameters + draft_parameters(shape) == WITH_DRAFT[name]


@pytest.mark.parametrize("name", WITH_DRAFT_AND_TOWER)
def test_parameters_are_the_published_ones_less_what_is_not_text(name: str) -> None:
    shape = released_shape(name)
    draft = layer_parameters(shape) + 2 * shape.hidden**2 + 3 * shape.hidden
    tower = 0 if "next" in name else tower_parameters(shape.hidden)
    assert shape.parameters + draft + tower == WITH_DRAFT_AND_TOWER[name]


def test_text_of_the_largest_weighs_as_many_bytes_as_its_files() -> None:
    assert released_shape("qwen3.5-397b-a17b").nbytes == 792_692_717_952


def tower_parameters(hidden: int) -> int:
    """Of Qwen3.5's tower: patches of 2 x 16 x 16 x 3, their positions, 27 blocks, four patches to a token."""
    dim, width = 1152, 4304
    block = 4 * dim * (dim + 1) + 2 * dim * width + dim + width + 4 * dim
    merger = 2 * dim + 4 * dim * (4 * dim + 1) + hidden * (4 * dim + 1)
    return dim * (2 * 16 * 16 * 3 + 1) + 2304 * dim + 27 * block + merger


def draft_parameters(shape: ModelShape) -> int:
    """A layer like the last, a projection of twice the width, an embedding and a head of its own, norms."""
    outside = shape.embedding.parameters + shape.head.parameters + 2 * shape.hidden
    return layer_parameters(shape) + 2 * shape.hidden**2 + outside


def layer_parameters(shape: ModelShape) -> int:
    """Of the last layer."""
    last = shape.layers[-1]
    return last.dense.parameters + last.shared.parameters + last.experts * last.expert.parameters


@pytest.mark.parametrize("name", WITH_PARTS_OF_A_DRAFT)
def test_parameters_are_the_published_ones_less_what_is_stored_of_the_draft_layer(name: str) -> None:
    shape = released_shape(name)
    with_indexer = max(
        layer.dense.parameters + layer.shared.parameters + layer.experts * layer.expert.parameters
        for layer in shape.layers
    )
    draft = with_indexer + 2 * shape.hidden**2 + 3 * shape.hidden
    assert shape.parameters + draft == WITH_PARTS_OF_A_DRAFT[name]


def test_v32_has_the_published_bytes() -> None:
    shape = released_shape("deepseek-v3.2")
    last, both = shape.layers[-1], shape.embedding.nbytes + shape.head.nbytes
    layer = last.dense.nbytes + last.shared.nbytes + last.experts * last.expert.nbytes
    draft = layer + 4 * shape.hidden**2 + both
    assert shape.nbytes + draft == pytest.approx(642.13 * (1 << 30), rel=1e-3)


@pytest.mark.parametrize("name", WITHOUT_DRAFT)
def test_parameters_without_a_draft_layer_are_the_published_ones(name: str) -> None:
    assert released_shape(name).parameters == WITHOUT_DRAFT[name]


def test_every_released_configuration_is_checked() -> None:
    here = PUBLISHED.keys() | WITH_DRAFT.keys() | WITH_PARTS_OF_A_DRAFT.keys()
    here |= WITH_DRAFT_AND_TOWER.keys()
    assert here | V4 == RELEASED.keys()
    assert RELEASED.keys() <= set(NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_moe",
        "mixtral",
        "olmoe",
        "granitemoe",
        "glm4_moe",
        "gpt_oss",
        "deepseek_v2",
        "deepseek_v3",
        "glm_moe_dsa",
        "qwen3_next",
        "qwen3_5_moe",
    ],
)
def test_a_config_alone_weighs_what_the_checkpoint_does(name: str) -> None:
    path = family_path(name)
    alone = config_shape(json.loads((path / "config.json").read_text()), name)
    assert alone == shape_of(open_checkpoint(path))


def test_only_norms_of_v32_weigh_more_than_a_config_alone_says() -> None:
    path = family_path("deepseek_v32")
    alone = config_shape(json.loads((path / "config.json").read_text()), "deepseek_v32")
    stored = shape_of(open_checkpoint(path))
    norms = 2 * 256 + 2 * 128 + 2 * 64  # of a layer, float32
    assert stored.nbytes - alone.nbytes == 3 * 2 * norms
    assert stored.parameters == alone.parameters


def test_an_expert_of_gpt_oss_weighs_as_much_as_its_report_says() -> None:
    assert math.isclose(released_shape("gpt-oss-20b").expert_nbytes, 13.2e6, rel_tol=0.01)


def test_a_config_is_planned_without_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED["qwen3-30b-a3b"]))
    planned = invoke("plan", file, "--hardware", "4090-128g", "--json")
    assert planned.returncode == 0
    assert json.loads(planned.stdout)["model_bytes"] == 61_064_245_248


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "deepseek_v41"}')
    refused = invoke("plan", file)
    assert refused.returncode == 1
    assert "planned from a checkpoint or by name" in refused.stderr


def test_a_packed_format_that_is_not_known_without_headers_is_refused() -> None:
    config = RELEASED["qwen3-30b-a3b"] | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ConfigError, match="weights of gptq can be planned from a checkpoint only"):
        config_shape(config, "qwen3")
