"""V4's released configurations weigh what was published, and are planned by name and by config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.families.decoder.config_only import config_shape
from engine.families.deepseek_v4.config import parse_config
from engine.families.deepseek_v4.shape import cache_shape
from engine.families.deepseek_v4.tensors import expected_tensors
from engine.families.loader import open_checkpoint
from engine.families.places import HOST
from engine.families.registry import family_of
from engine.families.released import RELEASED, released_shape
from engine.families.shapes import shape_of
from memory.checkpoint.checkpoint import Checkpoint
from tests.engine.families.golden_families import family_path
from tests.server.harness import invoke

FLASH, PRO = "deepseek-v4-flash", "deepseek-v4-pro"

# Parameters in billions, as reports round them; bytes of an expert, of all, of a token's.
PUBLISHED = {FLASH: (284, 13.37e6, 147.2e9, 3.45e9), PRO: (1573, 35.09e6, 822.1e9, 12.84e9)}
# With the draft stages behind the last layer, which are ignored here: bytes, tensors.
DRAFTS = {PRO: (864.7e9, 145_116), FLASH: (166.88e9, 72_317)}  # Flash: of its release 0731
# Per token of context, and fixed: windows, and groups that are not complete. Bytes in float32.
CACHE = {FLASH: (13_760, 11.3e6, 12.2e6), PRO: (19_696, 16.0e6, 18.7e6)}


def with_stages(name: str, stages: int) -> dict[str, Any]:
    """The config as if draft stages were further layers, which see their window alone."""
    config = RELEASED[name]
    ratios = [*config["compress_ratios"][: config["num_hidden_layers"]], *[0] * stages]
    return config | {"num_hidden_layers": len(ratios), "compress_ratios": ratios}


def tensors_of(config: dict[str, Any]) -> int:
    alone = Checkpoint(Path("config.json"), "deepseek_v4", config, {}, [])
    return len(expected_tensors(parse_config(alone), alone))


def fp8(rows: int, cols: int) -> int:
    return rows * cols + math.ceil(rows / 128) * math.ceil(cols / 128)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_experts_are_the_published_ones(name: str) -> None:
    billions, expert, experts, of_token = PUBLISHED[name]
    shape = released_shape(name)
    assert round(shape.parameters / 1e9) == billions
    assert shape.expert_nbytes == pytest.approx(expert, rel=1e-3)
    assert sum(layer.experts * layer.expert.nbytes for layer in shape.layers) == pytest.approx(
        experts, rel=1e-3
    )
    assert sum(shape.top_k * layer.expert.nbytes for layer in shape.layers) == pytest.approx(
        of_token, rel=1e-3
    )


def test_pro_with_its_draft_block_has_the_bytes_and_tensors_of_the_checkpoint() -> None:
    nbytes, tensors = DRAFTS[PRO]
    config, hidden = with_stages(PRO, 1), RELEASED[PRO]["hidden_size"]
    projections, norms, head_mix = 2 * fp8(hidden, hidden), 3 * 2 * hidden, 4 * (4 * 4 * hidden + 4 + 1)
    found = config_shape(config, PRO).nbytes + projections + norms + head_mix
    assert found == pytest.approx(nbytes, rel=1e-3)
    assert tensors_of(config) + 4 + 3 + 3 == tensors


def test_flash_with_three_draft_stages_has_the_bytes_and_tensors_of_the_checkpoint() -> None:
    nbytes, tensors = DRAFTS[FLASH]
    config, hidden = with_stages(FLASH, 3), RELEASED[FLASH]["hidden_size"]
    main, head_mix = fp8(hidden, 3 * hidden) + 2 * hidden, 4 * (4 * 4 * hidden + 4 + 1)
    last = 2 * hidden + head_mix + 2 * 2 * 129280 * 256 + 2 * (hidden + 256)
    found = config_shape(config, FLASH).nbytes + main + last
    assert found == pytest.approx(nbytes, rel=1e-3)
    assert tensors_of(config) + 3 + 4 + 3 == tensors


@pytest.mark.parametrize("name", CACHE)
def test_a_cache_takes_the_bytes_that_are_known(name: str) -> None:
    per_token, windows, open_groups = CACHE[name]
    shape = released_shape(name)
    assert shape.kv_bytes(1 << 20, 1) - shape.kv_bytes(0, 1) == per_token << 20
    ratios = RELEASED[name]["compress_ratios"][: len(shape.layers)]
    kept = 512 * len(ratios) + 2 * (2 * (512 + 128) * ratios.count(4) + 512 * ratios.count(128))
    longer = 16 * 4 * kept  # rings hold 16 tokens more than is read
    assert shape.kv_bytes(0, 1) - longer == pytest.approx(windows + open_groups, rel=0.02)


def test_planned_kv_is_what_the_engine_allocates() -> None:
    checkpoint = open_checkpoint(family_path("deepseek_v4"))
    config = parse_config(checkpoint)
    cache = cache_shape(config, (HOST,) * config.layers)
    assert shape_of(checkpoint).kv_bytes(300, 2) == cache.nbytes(slots=2, capacity=300)


def test_a_config_alone_weighs_what_the_checkpoint_does() -> None:
    path = family_path("deepseek_v4")
    alone = config_shape(json.loads((path / "config.json").read_text()), "deepseek_v4")
    assert alone == shape_of(open_checkpoint(path))


def test_every_byte_that_text_needs_is_in_the_shape() -> None:
    checkpoint = open_checkpoint(family_path("deepseek_v4"))
    _, components = family_of(checkpoint).describe(checkpoint)
    assert shape_of(checkpoint).nbytes == sum(component.nbytes for component in components)


def test_a_config_is_planned_without_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED[FLASH]))
    planned = invoke("plan", file, "--hardware", "2x4090-256g", "--json")
    assert planned.returncode == 0
    assert json.loads(planned.stdout)["model_bytes"] == released_shape(FLASH).nbytes


def test_experts_in_another_format_are_not_planned() -> None:
    refused = invoke("plan", FLASH, "--experts", "int4")
    assert refused.returncode == 1
    assert "experts of the deepseek_v4 family are not encoded while loading" in refused.stderr
