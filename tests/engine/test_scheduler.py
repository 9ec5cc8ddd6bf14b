"""Who computes next: answers always, prompts as far as answers can bear, and none of them waits for ever."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.params import SamplingParams
from engine.scheduler import MIN_PREFILL, Scheduler
from engine.sequence import Sequence

UNUSED: Any = None


def prompt_of(tokens: int) -> Sequence:
    return Sequence(
        sequence_id=tokens,
        token_ids=[5] * tokens,
        params=SamplingParams(),
        max_tokens=100,
        stop_token_ids=frozenset(),
        sampler=UNUSED,
        detokenizer=UNUSED,
        on_output=cast(Any, print),
    )


def running(scheduler: Scheduler, *prompts: int, answers: int = 0) -> list[Sequence]:
    """Sequences in the scheduler: first answers that go on, then prompts of these lengths."""
    for tokens in [1] * answers + list(prompts):
        scheduler.add(prompt_of(tokens))
    admitted = scheduler.admit()
    for sequence in admitted[:answers]:
        sequence.computed = 1
        sequence.token_ids.append(5)
    return admitted


def step(scheduler: Scheduler, token_s: float = 0.0, base_s: float = 0.0) -> dict[int, int]:
    """One step of a machine that takes base_s and token_s a prompt token: length by sequence id."""
    chunks = scheduler.next_chunks()
    prefill = sum(c.length for c in chunks if c.sequence.is_prefilling)
    scheduler.observe(chunks, base_s + prefill * token_s)
    for chunk in chunks:
        chunk.sequence.computed += chunk.length
        if not chunk.sequence.is_prefilling:
            chunk.sequence.token_ids.append(5)
    return {c.sequence.sequence_id: c.length for c in chunks}


def test_every_answer_goes_on_in_every_step() -> None:
    scheduler = Scheduler(8, 16, math.inf)
    answers = running(scheduler, 1000, 1000, answers=4)[:4]

    for _ in range(5):
        chunks = scheduler.next_chunks()
        assert [c.sequence for c in chunks[:4]] == answers
        assert [c.length for c in chunks[:4]] == [1] * 4
        step(scheduler)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = Scheduler(2, 512, math.inf)
    running(scheduler, 32_000, 100)

    assert step(scheduler) == {32_000: 412, 100: 100}


def test_the_oldest_prompt_always_goes_on() -> None:
    scheduler = Scheduler(8, 512, math.inf)
    running(scheduler, 32_000)
    for _ in range(20):
        running(scheduler, 600)
        assert step(scheduler)[32_000] >= 256
        for sequence in list(scheduler.running[1:]):
            if not sequence.is_prefilling:
                scheduler.release(sequence)


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=12, unique=True),
    budget=st.integers(1, 700),
    answers=st.integers(0, 3),
)
def test_all_prompts_end_and_no_step_exceeds_its_budget(
    lengths: list[int], budget: int, answers: int
) -> None:
    scheduler = Scheduler(16, budget, 0.05)
    sequences = running(scheduler, *lengths, answers=answers)[answers:]

    left = sum(lengths)
    while any(s.is_prefilling for s in sequences):
        chunks = [c for c in scheduler.next_chunks() if c.sequence in sequences and c.sequence.is_prefilling]
        assert 0 < sum(c.length for c in chunks) <= budget
        left -= sum(c.length for c in chunks)
        step(scheduler, token_s=0.001, base_s=0.01)
    assert left == 0


@pytest.mark.parametrize(("token_s", "base_s"), [(0.001, 0.02), (0.0002, 0.02), (0.001, 0.3)])
def test_prompts_leave_running_answers_their_pace(token_s: float, base_s: float) -> None:
    scheduler = Scheduler(4, 512, 0.1)
    running(scheduler, answers=2)
    step(scheduler, token_s, base_s)
    running(scheduler, 30_000)
    step(scheduler, token_s, base_s)

    for _ in range(20):
        tokens = step(scheduler, token_s, base_s)[30_000]
        took = base_s + tokens * token_s
        assert took <= max(0.1, 2 * base_s) * 1.01
        assert tokens == 512 or took > 0.9 * max(0.1, 2 * base_s)


def test_tokens_that_cost_more_the_longer_the_prompt_do_not_lengthen_steps() -> None:
    scheduler = Scheduler(5, 512, 0.25)
    running(scheduler, answers=4)
    step(scheduler, base_s=0.02)
    (prompt,) = running(scheduler, 32_000)
    step(scheduler, token_s=0.0005, base_s=0.02)

    while prompt.is_prefilling:
        token_s = 0.0005 * (1 + prompt.computed / 8000)
        took = 0.02 + step(scheduler, token_s, base_s=0.02)[prompt.sequence_id] * token_s
        assert took <= 0.25 * 1.1  # what is expected lags a little behind


def test_a_prompt_goes_on_however_slow_the_machine_is() -> None:
    scheduler = Scheduler(4, 512, 0.1)
    running(scheduler, answers=1)
    step(scheduler, 1.0, 0.01)
    running(scheduler, 1000)
    step(scheduler, 1.0, 0.01)

    assert step(scheduler, 1.0, 0.01)[1000] == MIN_PREFILL


def test_without_answers_a_prompt_gets_the_whole_step() -> None:
    scheduler = Scheduler(4, 512, 0.1)
    running(scheduler, 3000)

    assert [step(scheduler, 1.0, 1.0)[3000] for _ in range(3)] == [512] * 3


def test_what_a_long_chunk_took_alone_lengthens_no_step_with_answers() -> None:
    scheduler = Scheduler(4, 16_384, 0.25)
    running(scheduler, 200_000)
    assert step(scheduler, 0.0005, 8.0)[200_000] == 16_384
    running(scheduler, answers=1)
    beside = [step(scheduler, 0.0, 0.01)[200_000] for _ in range(3)]
    assert beside == [512, 1024, 2048]  # as it turns out to be cheap
