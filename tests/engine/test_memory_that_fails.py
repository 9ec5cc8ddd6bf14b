"""Pages that the system does not give, or does not take back: who is told, and that the rest goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from engine.drafts.base import Draft, DraftRequest, Rows
from engine.drafts.drafting import Drafting
from engine.engine import Engine
from engine.families.loader import Loaded, load
from engine.output import FinishReason
from memory.planner.budget import MemoryBudget
from tests.conftest import golden_path
from tests.engine.behind_another import behind_another
from tests.engine.chat.answers import Answer
from tests.engine.drafts.conversations import HalfRight

PROMPTS = [[5 + 7 * i % 300 for i in range(100)], [9] * 150]
FULL = OSError("No space left on device")


class Wrong(HalfRight):
    """A drafter whose drafts are taken back."""

    def observe(self, computed: Sequence[Rows]) -> None:
        pass

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [Draft((5,)) for _ in requests]


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    found = load(golden_path("v41-c"), MemoryBudget(dram_bytes=1 << 30))
    yield found
    found.model.close()


@pytest.fixture
def engine(loaded: Loaded) -> Engine:
    return engine_of(loaded)


def engine_of(loaded: Loaded, **more: Any) -> Engine:
    return Engine(loaded.model, loaded.tokenizer, max_sequences=3, max_context=400, prefill_chunk=256, **more)


def failing(method: Callable[..., Any], times: int = 1) -> Callable[..., Any]:
    """The method, whose first calls fail."""
    left = [times]

    def fail_or_not(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise FULL
        return method(*arguments)

    return fail_or_not


def check(engine: Engine, answers: list[Answer], failed: int | None) -> None:
    """All but one have ended as they should, that one was told, and no slot is lost."""
    for number, answer in enumerate(answers):
        assert answer.finish_reason is (FinishReason.ERROR if number == failed else FinishReason.LENGTH)
    if failed is not None:
        assert answers[failed].outputs[-1].error == "OSError in the engine"
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_a_sequence_that_gets_no_pages_to_grow_fails_alone(engine: Engine) -> None:
    check(engine, behind_another(engine, PROMPTS, lambda: engine.stats().running == 3, FULL), 0)


def test_a_sequence_that_gets_no_pages_to_begin_fails_alone(engine: Engine) -> None:
    check(engine, behind_another(engine, PROMPTS, lambda: True, FULL, slot=1, times=2), 1)


def test_a_sequence_that_gets_its_pages_the_second_time_goes_on(engine: Engine) -> None:
    check(engine, behind_another(engine, PROMPTS, lambda: True, FULL, slot=1), None)


def test_a_sequence_that_cannot_be_put_aside_fails_alone(engine: Engine) -> None:
    cache = engine.pool.cache
    cache.release = failing(cache.release)  # type: ignore[method-assign]
    check(engine, behind_another(engine, PROMPTS, lambda: engine.stats().running == 3), 2)


def test_pages_that_are_not_given_back_cost_no_answer_and_no_slot(engine: Engine) -> None:
    cache = engine.pool.cache
    cache.release = failing(cache.release, times=2)  # type: ignore[method-assign]
    check(engine, behind_another(engine, [*PROMPTS, *PROMPTS]), None)


def test_a_sequence_whose_drafts_cannot_be_taken_back_fails_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drafting, "roll_back", failing(Drafting.roll_back))
    drafter = Wrong(random.Random(0), loaded.model.info.vocab_size)
    engine = engine_of(loaded, drafters=[drafter], always_draft=1, prefix_cache_bytes=1 << 24)
    answers = behind_another(engine, PROMPTS)
    (failed,) = (n for n, answer in enumerate(answers) if answer.finish_reason is FinishReason.ERROR)
    check(engine, answers, failed)
