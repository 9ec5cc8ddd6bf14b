"""A model in parts answers like the whole: through the engine, with prefixes, in pieces, and after a loss.

The parts are in this process; tests/server/cluster has them in others.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.cluster import stages
from engine.cluster.messages import Handed, OpenedCache, PlannedKv, Restored, StageLostError, Work
from engine.cluster.part import Part
from engine.cluster.pieces import pieces_of
from engine.cluster.stage import Pending
from engine.cluster.stages import StagedModel
from engine.engine import Engine
from engine.families.base import Batch
from engine.families.loader import open_model
from engine.output import FinishReason, Output
from engine.sampling.params import SamplingParams
from engine.tokenizer.tokenizer import Tokenizer
from memory.checkpoint.part import Span
from memory.planner.budget import MemoryBudget
from quant.errors import LociError
from quant.kernels.choice import choose
from tests.conftest import golden_path

BUDGET = MemoryBudget(1 << 30)
PLENTY = PlannedKv(nbytes=1 << 30, tokens=1 << 20)


class Here:
    """A stage in this process, which can be lost and come back empty."""

    def __init__(self, part: Part, name: str) -> None:
        self.part, self.name = part, name
        self.is_lost = False

    def _call(self) -> Part:
        if self.is_lost:
            raise StageLostError(f"{self.name} is gone")
        return self.part

    def open(self, slots: int, capacity: int) -> OpenedCache:
        return self._call().open(slots, capacity)

    def session(self) -> str:
        return self._call().session()

    def work(self, work: Work, received: Pending | None) -> Handed:
        assert received is None or isinstance(received, Handed)
        return self._call().work(work, received)

    def fetch(self, pending: Pending) -> Handed:
        assert isinstance(pending, Handed)
        return pending

    def restore(self, work: Work, slot: int, prompt: NDArray[np.int32], salt: str) -> Restored:
        return self._call().restore(work, slot, prompt, salt)

    def fetch_restored(self, pending: Pending) -> Restored:
        assert isinstance(pending, Restored)
        return pending


class Staged:
    """A model in parts."""

    def __init__(
        self, path: Path, cuts: Sequence[int], prefix_bytes: Sequence[int], kv: PlannedKv = PLENTY
    ) -> None:
        opened = open_model(path)
        family, checkpoint = opened.family, opened.checkpoint
        spans = Span.between(cuts, len(family.shape(checkpoint).layers))
        self.stages = []
        for span, nbytes in zip(spans, prefix_bytes, strict=True):
            model = family.load(family.part(checkpoint, span), choose(), BUDGET)
            self.stages.append(Here(Part(model, is_last=span.is_last, kv=kv, prefix_bytes=nbytes), str(span)))
        described = [stage.part.describe(4) for stage in self.stages]
        self.model = StagedModel(self.stages, described, spans)
        self.model.info = replace(self.model.info, eos_token_ids=opened.info.eos_token_ids)
        self.tokenizer: Tokenizer = opened.tokenizer

    def close(self) -> None:
        self.model.close()
        for stage in self.stages:
            stage.part.close()


@pytest.fixture
def staged() -> Iterator[Staged]:
    found = Staged(golden_path("v41-a"), [4], [50_000_000] * 2)
    yield found
    found.close()


def engine_of(model: object, tokenizer: Tokenizer, **more: int) -> Engine:
    engine = Engine(model, tokenizer, max_sequences=4, max_context=600, prefill_chunk=200, **more)  # type: ignore[arg-type]
    engine.start()
    return engine


def answers(engine: Engine, prompts: Sequence[list[int]], tokens: int = 12) -> list[list[Output]]:
    """What the engine answers, asked at the same time."""
    found: list[list[Output]] = [[] for _ in prompts]
    done = threading.Semaphore(0)

    def on_output(at: int) -> object:
        def take(output: Output) -> None:
            found[at].append(output)
            if output.finish_reason is not None:
                done.release()

        return take

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2)
    for at, prompt in enumerate(prompts):
        engine.submit(prompt, params, on_output(at))  # type: ignore[arg-type]
    for _ in prompts:
        assert done.acquire(timeout=60)
    return found


def said(outputs: list[Output]) -> tuple[list[int], list[object]]:
    """Token ids, and their log probabilities to the bit."""
    return (
        [i for output in outputs for i in output.token_ids],
        [probability for output in outputs for probability in output.logprobs or ()],
    )


def prompts_of(vocab: int) -> list[list[int]]:
    drawn = random.Random(5)
    common = [drawn.randrange(3, vocab) for _ in range(150)]
    return [common + [drawn.randrange(3, vocab) for _ in range(n)] for n in (3, 40, 150, 1, 260, 90)]


def test_the_engine_says_the_same_with_the_model_in_two_parts(staged: Staged) -> None:
    opened = open_model(golden_path("v41-a"))
    whole = opened.load(BUDGET).model
    prompts = prompts_of(whole.info.vocab_size)
    alone = engine_of(whole, opened.tokenizer, prefix_cache_bytes=50_000_000)
    expected = [said(each) for each in answers(alone, prompts)]
    alone.stop()
    whole.close()
    engine = engine_of(staged.model, staged.tokenizer)
    assert [said(each) for each in answers(engine, prompts)] == expected
    assert [said(each) for each in answers(engine, prompts)] == expected  # from the parts' own prefixes
    stats = engine.stats().prefixes
    engine.stop()
    assert stats is not None
    assert stats.cached_tokens >= sum(map(len, prompts)) - 16 * len(prompts)


def test_a_prefix_that_one_part_has_forgotten_is_shorter_for_all() -> None:
    staged = Staged(golden_path("v41-a"), [1, 4], [50_000_000, 150_000, 50_000_000])  # the second holds few
    prompts = prompts_of(staged.model.info.vocab_size)
    engine = engine_of(staged.model, staged.tokenizer)
    first = [said(each) for each in answers(engine, prompts)]
    assert [said(each) for each in answers(engine, prompts[::-1])][::-1] == first
    assert staged.stages[1].part.kept_bytes()[1] > 0
    engine.stop()
    staged.close()


def test_a_lost_part_ends_what_ran_and_the_next_request_is_answered(staged: Staged) -> None:
    engine = engine_of(staged.model, staged.tokenizer)
    prompts = prompts_of(staged.model.info.vocab_size)[:2]
    expected = [said(each) for each in answers(engine, prompts)]
    staged.stages[1].is_lost = True
    for outputs in answers(engine, prompts):
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert "gone" in str(outputs[-1].error)
    staged.stages[1].part.open(1, 1)  # what comes back is another session
    staged.stages[1].is_lost = False
    for _ in range(100):
        if staged.model.is_up:
            break
        threading.Event().wait(0.1)
    assert [said(each) for each in answers(engine, prompts)] == expected
    assert staged.model.hops.lost == 1
    engine.stop()


def test_another_cache_is_no_loss(staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "WATCH_S", 0.001)
    open_second = staged.stages[1].open

    def open_late(slots: int, capacity: int) -> OpenedCache:
        time.sleep(0.05)  # the first part has the new session already
        return open_second(slots, capacity)

    monkeypatch.setattr(staged.stages[1], "open", open_late)
    for slots in (1, 2):
        staged.model.new_cache(slots, 64)
    time.sleep(0.05)
    assert staged.model.hops.lost == 0
    assert staged.model.is_up


def test_a_pool_that_one_part_limits_is_kept_by_all() -> None:
    plan = PlannedKv(nbytes=1_000_000, tokens=700)
    staged = Staged(golden_path("v41-b"), [3], [0, 0], plan)
    engine = engine_of(staged.model, staged.tokenizer)
    prompts = prompts_of(staged.model.info.vocab_size)
    assert engine.pool.tokens <= 700
    for outputs in answers(engine, prompts):
        assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert all(stage.part.held_pages <= 1_000_000 for stage in staged.stages)
    engine.stop()
    staged.close()


def test_an_idle_engine_has_taken_what_does_not_grow_and_no_pool() -> None:
    staged = Staged(golden_path("v41-a"), [4], [0, 0], PlannedKv(nbytes=600_000, tokens=600))
    engine = engine_of(staged.model, staged.tokenizer)
    stats = engine.stats()
    fixed = sum(stage.part.model.new_cache(4, 600).bytes_at(0) for stage in staged.stages)
    assert 0 < stats.kv_budget_bytes <= 2 * 600_000
    assert stats.kv_bytes == fixed + stats.kv_budget_bytes
    assert stats.kv_bytes - (stats.kv_budget_bytes - sum(stats.kv_taken)) == fixed
    engine.stop()
    staged.close()


@pytest.mark.parametrize("stages", [2, 3])
def test_pieces_are_the_batch_in_order(stages: int) -> None:
    drawn = random.Random(stages)
    for _ in range(200):
        lengths = [drawn.choice([1, 1, 1, 7, 100, 300]) for _ in range(drawn.randint(1, 6))]
        parts = [(slot, drawn.randrange(50), [drawn.randrange(90)] * n) for slot, n in enumerate(lengths)]
        batch = Batch.of(parts)
        batch = replace(batch, to_come=tuple(drawn.choice([None, 0, 9]) for _ in parts))
        pieces = pieces_of(batch, stages)
        assert [i for piece in pieces for i in piece.ids] == list(batch.ids)
        rows, at = [], 0
        places: tuple[list[int], list[int]] = ([], [])
        for piece in pieces:
            rows += [row + at for row in piece.logit_rows.tolist()]
            at += len(piece.ids)
            for all_of, some in zip(places, piece.places(), strict=True):
                all_of.extend(some)
            ends = {
                s.slot: s.start + s.length + n
                for s, n in zip(piece.segments, piece.to_come or (), strict=True)
                if n is not None
            }
            wanted = {
                s.slot: s.start + s.length + n
                for s, n in zip(batch.segments, batch.to_come or (), strict=True)
                if n is not None
            }
            assert all(wanted[slot] == end for slot, end in ends.items())
        assert rows == batch.logit_rows.tolist()
        assert places == batch.places()


def test_an_error_of_a_part_is_the_requests_alone(staged: Staged) -> None:
    engine = engine_of(staged.model, staged.tokenizer)
    forward = staged.stages[0].part.model.forward

    def fails(*_: object) -> torch.Tensor:
        raise LociError("the disk cannot be read")

    prompt = prompts_of(staged.model.info.vocab_size)[:1]
    expected = said(answers(engine, prompt)[0])
    staged.stages[0].part.model.forward = fails  # type: ignore[method-assign, assignment]
    (outputs,) = answers(engine, [prompt[0][::-1]])
    assert outputs[-1].error == "the disk cannot be read"
    staged.stages[0].part.model.forward = forward  # type: ignore[method-assign]
    assert staged.model.is_up
    assert said(answers(engine, prompt)[0]) == expected
    engine.stop()
