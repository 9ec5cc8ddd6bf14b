"""Drafts are never slower than none by more than two hundredths, and find the gain where there is one.

A server's life is simulated with a clock of its own: steps, drafts and what drafters are told take as long as
is said here, and so many drafted tokens are right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from engine.drafts import drafting as drafting_module
from engine.drafts import proposals as proposals_module
from engine.drafts.acceptance import Acceptance
from engine.drafts.base import MOST_ROWS, NOTHING, Draft, Drafter, DraftRequest, Rows
from engine.drafts.choose import LOAN_OF_ALL, Credit
from engine.drafts.drafting import Drafting
from engine.drafts.proposals import Opened, Proposals
from engine.drafts.step_times import StepTimes
from engine.scheduler import Chunk

STEP_S = 1.0  # of one token
FIRST = 400  # tokens by which a server has learned what it can
NOTHING_LOST = 0.98
ROWS = 16  # tokens that a drafter is told of in the same time as of one


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Simulated:
    """A drafter: what a draft takes, and what it takes to be told of a few tokens.

    finds   by how long the text is, whether there is anything to draft
    slow_s  that the next call takes longer in which there is nothing
    """

    name: str
    clock: Clock
    draft_s: float
    told_s: float = 0.0
    kinds: tuple[int, ...] = (0,)
    longest: int = 5
    is_whole: bool = True
    nbytes: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    finds: Callable[[int], bool] = lambda length: True
    slow_s: float = 0.0

    @property
    def wants_captures(self) -> bool:
        return self.told_s > 0

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        pass

    def close(self, sequence_id: int) -> None:
        pass

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.clock.now += self.draft_s
        if not any(self.finds(len(request.token_ids)) for request in requests):
            self.clock.now, self.slow_s = self.clock.now + self.slow_s, 0.0
        return [
            Draft((1,) * min(request.most, self.longest), kind=self.rng.choice(self.kinds))
            if self.finds(len(request.token_ids))
            else NOTHING
            for request in requests
        ]

    def observe(self, computed: Sequence[Rows]) -> None:
        tokens = sum(len(rows.token_ids) for rows in computed)
        self.clock.now += self.told_s * -(-tokens // ROWS)


@dataclass(eq=False)
class Answered:
    """What drafting knows of a sequence."""

    sequence_id: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=lambda: [1] * 8)
    prediction: tuple[int, ...] = ()
    slot: int = 0
    is_prefilling: bool = False
    generated: int = 0
    computed: int = 7


class Life:
    """A server's: answers one after the other, whose drafted tokens are right with a chance.

    each_s  that each further token of a step takes
    noise   by which steps' times differ, at most
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, each_s: float, *drafters: Any, noise: float = 0.1
    ) -> None:
        self.clock: Clock = drafters[0].clock
        monkeypatch.setattr(drafting_module, "time", self.clock)
        monkeypatch.setattr(proposals_module, "time", self.clock)
        model: Any = SimpleNamespace(
            captured=lambda: [None], drop_captured=lambda: None, expect=lambda ahead: None
        )
        kept: Any = SimpleNamespace(computes_again=False, keep=lambda slot: True, drop=lambda slot: None)
        known: Sequence[Drafter] = drafters
        self._drafting = Drafting(model, known, kept, 15)
        self._rng, self._each_s, self._noise, self._count = random.Random(0), each_s, noise, 0

    def answer(
        self, tokens: int, right: float, *, prompt: int = 0, prediction: tuple[int, ...] = (), beside: int = 0
    ) -> float:
        """How much faster an answer of so many tokens came than without drafts.

        prompt  tokens of it that are computed, and told, before that
        beside  sequences that wait meanwhile, with prompts that are not computed
        """
        drafting = self._drafting
        sequence: Any = self._sequence(tokens, prediction)
        others: list[Any] = [self._sequence(tokens, (), is_prefilling=True) for _ in range(beside)]
        if prompt:
            sequence.token_ids += [1] * prompt
            sequence.is_prefilling = True
            chunks = drafting.propose([Chunk(sequence, prompt)])
            captures = drafting.captured()
            sequence.is_prefilling, sequence.computed = False, len(sequence.token_ids) - 1
            drafting.observe(chunks, [sequence.computed - prompt], captures)
        began = self.clock.now
        while sequence.generated < tokens:
            self._step(sequence, right)
        for one in (sequence, *others):
            drafting.close(one)
        return tokens * STEP_S / (self.clock.now - began)

    def _sequence(self, tokens: int, prediction: tuple[int, ...], *, is_prefilling: bool = False) -> Any:
        """A new one, that is open."""
        sequence: Any = Answered(
            self._count, tokens, prediction=prediction, slot=self._count, is_prefilling=is_prefilling
        )
        self._count += 1
        self._drafting.open(sequence)
        return sequence

    def _step(self, sequence: Any, right: float) -> None:
        begun, drafting = self.clock.now, self._drafting
        chunks = drafting.propose([Chunk(sequence, 1)])
        seconds = STEP_S + self._each_s * (chunks[0].length - 1)
        self.clock.now += seconds * self._rng.uniform(1 - self._noise, 1 + self._noise)
        captures, start, accepted = drafting.captured(), sequence.computed, 0
        while accepted < len(chunks[0].drafted) and self._rng.random() < right:
            accepted += 1
        sequence.token_ids += [1] * (accepted + 1)
        sequence.generated += accepted + 1
        sequence.computed = len(sequence.token_ids) - 1
        drafting.observe(chunks, [start], captures)
        drafting.learn(chunks, [accepted], [accepted], self.clock.now - begun)

    def step_of_many(self, sequences: Sequence[Any], right: float) -> float:
        """A step of one token of each; how long it took."""
        begun, drafting = self.clock.now, self._drafting
        chunks = drafting.propose([Chunk(sequence, 1) for sequence in sequences])
        self.clock.now += STEP_S + self._each_s * (sum(chunk.length for chunk in chunks) - 1)
        drafting.captured()
        counts = []
        for chunk in chunks:
            accepted = 0
            while accepted < len(chunk.drafted) and self._rng.random() < right:
                accepted += 1
            chunk.sequence.token_ids += [1] * (accepted + 1)
            counts.append(accepted)
        drafting.learn(chunks, counts, counts, self.clock.now - begun)
        return self.clock.now - begun

    def answer_that_ends_in_a_draft(self, tokens: int) -> float:
        """As `answer`, but only its last token, which ends it, can be drafted."""
        drafting, sequence = self._drafting, self._sequence(tokens + 16, ())
        began = self.clock.now
        for number in range(tokens):
            begun = self.clock.now
            chunks = drafting.propose([Chunk(sequence, 1)])
            self.clock.now += STEP_S + self._each_s * (chunks[0].length - 1)
            accepted = int(number == tokens - 1 and bool(chunks[0].drafted))
            sequence.token_ids += [1]
            sequence.generated += 1
            drafting.learn(chunks, [accepted], [0], self.clock.now - begun)
        drafting.close(sequence)
        return tokens * STEP_S / (self.clock.now - began)


def speeds(life: Life, answers: int, tokens: int, right: float, **options: Any) -> float:
    """How much faster so many answers came together; options of `answer`."""
    found = [life.answer(tokens, right, **options) for _ in range(answers)]
    return len(found) / sum(1 / ratio for ratio in found)


@pytest.mark.parametrize("tokens", [30, 200], ids=["short", "long"])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.6, 0.8])
def test_where_drafts_cannot_pay_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, tokens: int, right: float
) -> None:
    """As where a model lies in the processor's cache: further tokens cost half a step, and so does a block;
    being told of tokens costs a twentieth."""
    clock = Clock()
    stages = Simulated("dspark", clock, draft_s=0.8, told_s=0.05)
    looked = Simulated("lookup", clock, draft_s=0.05, kinds=(2, 3, 4, 8), longest=15)
    life = Life(monkeypatch, 0.5, looked, stages)
    first = speeds(life, -(-FIRST // tokens), tokens, right)
    assert first > 0.9
    assert speeds(life, 3000 // tokens, tokens, right) > NOTHING_LOST


@pytest.mark.parametrize("right", [0.0, 0.2, 0.31])
def test_look_ups_that_are_mostly_wrong_lose_nothing(monkeypatch: pytest.MonkeyPatch, right: float) -> None:
    looked = Simulated("lookup", Clock(), draft_s=0.005, kinds=(2, 3, 4, 5, 8), longest=15)
    life = Life(monkeypatch, 0.35, looked)
    assert speeds(life, 2, 200, right) > 0.95
    assert speeds(life, 12, 200, right) > NOTHING_LOST


@pytest.mark.parametrize(("each_s", "right", "least"), [(0.1, 0.8, 1.7), (0.2, 0.7, 1.15), (0.05, 0.9, 2.5)])
def test_the_gain_is_found_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, each_s: float, right: float, least: float
) -> None:
    stages = Simulated("dspark", Clock(), draft_s=0.3, told_s=0.01)
    life = Life(monkeypatch, each_s, stages)
    speeds(life, 4, 100, right)
    assert speeds(life, 20, 100, right) > least


def test_look_ups_gain_as_soon_as_answers_repeat_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long life in which they never did."""
    looked = Simulated("lookup", Clock(), draft_s=0.005, kinds=(3, 8), longest=15)
    life = Life(monkeypatch, 0.1, looked)
    speeds(life, 30, 200, 0.05)
    assert speeds(life, 3, 200, 0.9) > 1.5


def test_an_answer_that_repeats_something_is_looked_at_again_where_it_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looking takes a tenth of a step; fifteen tokens of thirty can be copied."""
    looked = Simulated(
        "lookup", Clock(), draft_s=0.1, kinds=(8,), longest=15, finds=lambda length: length % 30 < 15
    )
    life = Life(monkeypatch, 0.1, looked)
    speeds(life, 3, 200, 0.97)
    assert speeds(life, 3, 200, 0.97) > 1.3


def test_answers_that_repeat_nothing_lose_little_between_those_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = Simulated("lookup", Clock(), draft_s=0.05, kinds=(2, 3, 8), longest=15)
    life = Life(monkeypatch, 0.3, looked)
    for _ in range(3):
        speeds(life, 3, 200, 0.95)
        assert life.answer(200, 0.1) > 0.97


def test_one_look_that_something_else_held_up_does_not_end_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = Simulated(
        "lookup", Clock(), draft_s=0.01, kinds=(8,), longest=15, finds=lambda length: length % 30 < 15
    )
    life = Life(monkeypatch, 0.1, looked)
    speeds(life, 6, 200, 0.97)
    looked.slow_s = 500 * STEP_S
    life.answer(200, 0.97)
    assert looked.slow_s == 0
    assert speeds(life, 10, 200, 0.97) > 1.3


def test_a_draft_that_ends_an_answer_has_saved_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where labels are looked up: the answer would have ended in that step anyway."""
    looked = Simulated("lookup", Clock(), draft_s=0.005, kinds=(8,), longest=15)
    looked.finds = lambda length: length == 8 + 2
    life = Life(monkeypatch, 0.3, looked)
    for _ in range(200):
        life.answer_that_ends_in_a_draft(3)
    found = [life.answer_that_ends_in_a_draft(3) for _ in range(1000)]
    assert len(found) / sum(1 / ratio for ratio in found) > NOTHING_LOST


def test_answers_that_share_a_step_lose_no_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = Simulated("lookup", Clock(), draft_s=0.005, kinds=(8,), longest=15, finds=lambda length: False)
    life = Life(monkeypatch, 0.1, looked)
    first = [life._sequence(10_000, ()) for _ in range(8)]
    for _ in range(20):
        life.step_of_many(first, 0.0)
    for sequence in first:
        life._drafting.close(sequence)
    looked.finds = lambda length: True
    answers = [life._sequence(10_000, ()) for _ in range(8)]
    took = sum(life.step_of_many(answers, 0.0) for _ in range(40))
    plain = 40 * (STEP_S + 7 * life._each_s)
    assert (took - plain) / plain * 40 * len(answers) < 1.5 * LOAN_OF_ALL  # tokens' time


def test_who_may_not_draft_any_more_hides_nobody() -> None:
    """A look-up promises more than the stages, but its answer has lost what it may by look-ups."""
    clock, times = Clock(), StepTimes(MOST_ROWS)
    for tokens in (1, 2, 4):
        times.observe(tokens, STEP_S * (1 + 0.05 * tokens))
    looked = Simulated("lookup", clock, draft_s=0.0, kinds=(8,), longest=15)
    stages = Simulated("dspark", clock, draft_s=0.1)
    proposals = Proposals([looked, stages], times, always=None, computes_again=False)
    opened = Opened(Acceptance({}), Credit())
    sequence: Any = Answered(0, 100)
    for lost, drafter in ((0.0, looked), (2.0, stages)):
        opened.credit.drafted(-lost, is_free=True)
        proposals.begin()
        (draft,) = proposals.chosen([Chunk(sequence, 1)], [opened], [15], [looked, stages], 15)
        assert draft.token_ids
        assert opened.drafter is drafter


def test_stages_that_rest_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Simulated("dspark", Clock(), draft_s=0.3, told_s=0.02)
    life = Life(monkeypatch, 0.1, stages)
    assert speeds(life, 10, 200, 0.0) > 0.97
    speeds(life, 40, 200, 0.9)
    assert speeds(life, 10, 200, 0.9) > 1.5


def test_who_has_read_a_long_prompt_drafts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it takes longer than a drafter may lose in all."""
    stages = Simulated("mtp", Clock(), draft_s=0.1, told_s=0.1)
    life = Life(monkeypatch, 0.1, stages)
    assert speeds(life, 1, 100, 0.8, prompt=4096) > 1.3
    assert speeds(life, 10, 100, 0.8, prompt=4096) > 1.5


def test_who_reads_prompts_for_nothing_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Simulated("mtp", Clock(), draft_s=0.1, told_s=0.1)
    life = Life(monkeypatch, 0.5, stages)
    speeds(life, 4, 100, 0.0, prompt=4096)
    before = life.clock.now
    life.answer(100, 0.0, prompt=4096)
    assert life.clock.now - before < 110 * STEP_S  # nobody read it


def test_prompts_that_come_together_make_nobody_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Simulated("dspark", Clock(), draft_s=0.3, told_s=0.01)
    life = Life(monkeypatch, 0.1, stages)
    speeds(life, 4, 100, 0.8)
    assert speeds(life, 4, 100, 0.8, beside=12) > 1.5
    assert speeds(life, 4, 100, 0.8) > 1.5


def test_predictions_that_are_wrong_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching them takes a fiftieth of a step, and so does searching the text."""
    clock = Clock()
    predicted = Simulated("prediction", clock, draft_s=0.02, longest=15)
    looked = Simulated("lookup", clock, draft_s=0.02, kinds=(2, 3), longest=15)
    life = Life(monkeypatch, 0.5, predicted, looked)
    assert speeds(life, 4, 200, 0.0, prediction=(1,) * 100) > 0.95
    assert speeds(life, 10, 200, 0.0, prediction=(1,) * 100) > NOTHING_LOST
