"""A drafter that fails costs no answer: from then on, nothing is drafted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine.drafts.base import Draft, DraftRequest, Rows
from engine.families.loader import load
from memory.planner.budget import MemoryBudget
from tests.conftest import golden_path
from tests.engine.drafts.conversations import HalfRight, answered, some_turns


class Failing(HalfRight):
    """Fails when it is asked, or told, for the third time."""

    def __init__(self, where: str, vocab: int) -> None:
        super().__init__(random.Random(0), vocab)
        self._where, self._left = where, 3

    def _fail(self, where: str) -> None:
        if where == self._where:
            self._left -= 1
            if not self._left:
                raise RuntimeError("out of order")

    def observe(self, computed: Sequence[Rows]) -> None:
        self._fail("observe")

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self._fail("draft")
        return [Draft((5,)) for _ in requests]


@pytest.mark.parametrize("where", ["draft", "observe"])
def test_answers_are_the_same_when_a_drafter_fails(where: str, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(golden_path("v41-a"), MemoryBudget(dram_bytes=1 << 30))
    try:
        vocab = loaded.model.info.vocab_size
        turns = [replace(t, aborts_after=None) for t in some_turns(random.Random(1), 6, vocab, greedy=True)]
        expected, prompts = answered(loaded, turns)
        failing = Failing(where, vocab)
        found, _ = answered(loaded, turns, prompts, drafters=[failing], draft_tokens=2, always_draft=2)
    finally:
        loaded.model.close()
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert caplog.text.count("a drafter failed; nothing is drafted any more") == 1
