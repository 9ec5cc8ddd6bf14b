"""A model's own drafters in the engine: no answer changes, and memory for their weights is kept."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.drafts.choice import drafters_of
from engine.drafts.own import own_draft_bytes, room_for_drafts
from engine.engine import Engine
from engine.families.loader import Loaded, load, open_model
from engine.output import FinishReason
from memory.planner.budget import MemoryBudget
from quant.errors import ConfigError
from tests.conftest import golden_path
from tests.engine.drafts.conversations import answered, some_turns
from tests.engine.drafts.random_stages import StageKeys, v4_with_stages, v41_stages, with_stages
from tests.engine.families.golden_families import family_path

PLENTY = MemoryBudget(1 << 30)
KEYS = StageKeys()
NAMES = ("v41", "v4 stages", "deepseek_v4", "deepseek_v3", "glm4_moe", "glm_moe_dsa", "qwen3_next")


@pytest.fixture(scope="module")
def v41(tmp_path_factory: pytest.TempPathFactory) -> Path:
    golden = golden_path("v41-a")
    config = json.loads((golden / "config.json").read_text())["text_config"]
    to = tmp_path_factory.mktemp("own") / "v41"
    return with_stages(golden, to, v41_stages(config, KEYS), KEYS.keys())


@pytest.fixture(scope="module", params=NAMES)
def own(
    request: pytest.FixtureRequest, v41: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loaded]:
    if request.param == "v4 stages":
        path = v4_with_stages(tmp_path_factory.mktemp("own") / "v4")
    else:
        path = v41 if request.param == "v41" else family_path(request.param)
    loaded = load(path, PLENTY, drafts="mtp")
    assert loaded.own_drafts is not None
    yield loaded
    loaded.own_drafts.close()
    loaded.model.close()


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "drawn"])
def test_no_answer_changes_with_a_models_own_drafts(own: Loaded, greedy: bool) -> None:
    """Three at a time, with aborts and with prompts that go on from others."""
    rng = random.Random(3)
    turns = some_turns(rng, 12, own.model.info.vocab_size, greedy=greedy)
    expected, prompts = answered(own, turns)
    drafters = drafters_of("mtp", own, 3, 200)
    found, _ = answered(own, turns, prompts, drafters=drafters, draft_tokens=5, always_draft=3)
    for turn, one, other in zip(turns, expected, found, strict=True):
        if turn.aborts_after is not None and other.finish_reason == FinishReason.ABORT:
            assert other.token_ids == one.token_ids[: len(other.token_ids)]
        else:
            assert (other.token_ids, other.text) == (one.token_ids, one.text)


def test_memory_for_drafts_is_kept_where_they_are_small_or_asked_for(
    v41: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_model(v41)
    needed = own_draft_bytes(opened.family, opened.checkpoint)
    assert needed > sum(
        entry.nbytes for name, entry in opened.checkpoint.entries.items() if name.startswith("mtp.")
    )

    def room(wanted: str, dram_bytes: int) -> int:
        return room_for_drafts(wanted, opened.family, opened.checkpoint, dram_bytes)  # type: ignore[arg-type]

    assert room("off", 100 * needed) == 0
    assert room("auto", 11 * needed) == room("mtp", 2 * needed) == needed
    with caplog.at_level(logging.INFO, logger="loci.engine"):
        assert room("auto", 9 * needed) == 0
    assert "--drafts mtp reads them" in caplog.text


def test_nothing_is_drafted_where_states_cannot_be_copied(caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(family_path("qwen3_next"), PLENTY)
    drafters = drafters_of("lookup", loaded, 1, 100)
    with caplog.at_level(logging.INFO, logger="loci.engine"):
        engine = Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=100, drafters=drafters)
    assert engine.stats().drafts is None
    assert "in memory that a prefix cache lends" in caplog.text
    loaded.model.close()


def test_a_model_without_draft_layers_says_so_where_they_are_asked_for() -> None:
    loaded = load(golden_path("v41-a"), PLENTY, drafts="mtp")
    with pytest.raises(ConfigError, match="no draft layers that Loci can use"):
        drafters_of("mtp", loaded, 1, 100)
    assert [drafter.name for drafter in drafters_of("auto", loaded, 1, 100)] == ["prediction", "lookup"]
    loaded.model.close()
