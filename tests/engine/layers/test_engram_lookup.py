"""Engram rows that are asked for ahead change nothing but when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.families.base import Batch
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.registry import family_of
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.kernels.choice import choose
from tests.conftest import golden_path

PROMPTS = [[11, 40, 7, 300, 41], [9, 9, 200, 17], [77, 5, 6, 7, 8, 9, 10]]
NEXT = [23, 19, 400]


@pytest.fixture(scope="module", params=[1 << 30, 4_300_000], ids=["all in memory", "on disk"])
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekV41]:
    checkpoint = open_safetensors(golden_path("v41-a"))
    model = family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(request.param))
    assert isinstance(model, DeepseekV41)
    assert (model.parts.ngrams is None) == (request.param < 1 << 30)
    yield model
    model.close()


def asked(model: DeepseekV41) -> int:
    return model.telemetry.snapshot().rows["asked"]


def step(model: DeepseekV41, *expected: tuple[int, int]) -> tuple[torch.Tensor, int]:
    """Logits of a step that goes on with sequences 0 and 2 and begins sequence 1 between them, and the rows
    that it and the expectations asked for."""
    cache = model.new_cache(3, 32)
    for slot in (0, 2):
        model.forward(Batch.of([(slot, 0, PROMPTS[slot])]), cache)
    before = asked(model)
    model.expect([(PROMPTS[slot], token) for slot, token in expected])
    parts = [
        (0, len(PROMPTS[0]), NEXT[:1]),
        (1, 0, PROMPTS[1]),
        (2, len(PROMPTS[2]), NEXT[2:]),
    ]
    logits = model.forward(Batch.of(parts, all_logits=True), cache)
    return logits, asked(model) - before


def test_expected_tokens_give_the_same_logits_and_ask_for_no_row_twice(model: DeepseekV41) -> None:
    logits, rows = step(model)
    for expected in ([(0, NEXT[0])], [(2, NEXT[2]), (0, NEXT[0])], [(0, NEXT[0]), (0, NEXT[0])]):
        ahead, rows_ahead = step(model, *expected)
        assert torch.equal(ahead, logits)
        assert rows_ahead == rows


def test_what_was_expected_in_vain_changes_nothing(model: DeepseekV41) -> None:
    logits, _ = step(model)
    vain, _ = step(model, (0, NEXT[2]), (1, NEXT[0]), (2, NEXT[0]))
    assert torch.equal(vain, logits)


def test_rows_expected_of_a_sequence_that_ended_do_not_reach_the_next_in_its_slot(model: DeepseekV41) -> None:
    def second(expects: bool) -> torch.Tensor:
        cache = model.new_cache(1, 32)
        model.forward(Batch.of([(0, 0, PROMPTS[0])]), cache)
        if expects:
            model.expect([(PROMPTS[0], NEXT[0])])
        cache.reset(0)
        return model.forward(Batch.of([(0, 0, NEXT[:1])]), cache)

    assert torch.equal(second(expects=True), second(expects=False))
