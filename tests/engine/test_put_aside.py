"""A pool too small for all sequences together: the youngest are put aside, and every answer is the same."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import steps
from engine.cache import aside as aside_module
from engine.cache.aside import AsideOnDisk, AsideStats
from engine.cache.prefix import PrefixCache
from engine.engine import Engine
from engine.families.loader import Loaded, load
from engine.kv_pool import PoolSize
from engine.output import FinishReason
from engine.sampling.params import SamplingParams
from memory.planner.budget import MemoryBudget
from quant.errors import ConfigError
from tests.conftest import golden_path
from tests.engine.behind_another import behind_another
from tests.engine.chat.answers import Answer

CONTEXT = 1600
LENGTHS = (5, 900, 40, 300, 700, 2, 120, 500)  # of prompts
ANSWERS = (500, 300, 560, 400, 250, 600, 480, 350)  # tokens
HALF = (sum(LENGTHS) + sum(ANSWERS)) // 2


@pytest.fixture(scope="module", params=["v41-c", "families/qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    found = load(golden_path(request.param), MemoryBudget(dram_bytes=1 << 30))
    yield found
    found.model.close()


def engine_of(loaded: Loaded, tokens: int | None, **options: Any) -> Engine:
    """An engine of eight slots with a pool for so many tokens in all."""
    context = min(CONTEXT, tokens or CONTEXT)
    nbytes = None if tokens is None else loaded.model.new_cache(1, context).pages.nbytes(tokens)
    size = PoolSize(nbytes, is_given=True)
    return Engine(
        loaded.model, loaded.tokenizer, max_sequences=8, max_context=context, prefill_chunk=256, pool=size,
        **options,
    )  # fmt: skip


def texts(engine: Engine, **params: Any) -> list[Answer]:
    """Eight answers of mixed lengths, asked for at once."""
    engine.start()
    try:
        answers = []
        vocab = engine.model.info.vocab_size
        for number, (length, count) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
            answers.append(Answer())
            prompt = [(7 * i + number) % (vocab - 10) + 5 for i in range(length)]
            asked = SamplingParams(
                temperature=1.0, seed=number, max_tokens=count, ignore_eos=True,
                repetition_penalty=1.1, **params,
            )  # fmt: skip
            engine.submit(prompt, asked, answers[-1])
        return [answer.wait() for answer in answers]
    finally:
        engine.stop()


def check(engine: Engine, expected: list[Answer], **params: Any) -> AsideStats:
    """Let the engine answer; every answer is as expected, and nothing of the pool was exceeded or is left."""
    found = texts(engine, **params)
    stats = engine.stats()
    assert [answer.finish_reason for answer in found] == [FinishReason.LENGTH] * 8
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert stats.kv_peak_bytes <= stats.kv_budget_bytes
    assert stats.aside is not None
    assert (stats.sequences_aside, stats.aside.dram_bytes, stats.aside.disk_bytes) == (0, 0, 0)
    return stats.aside


@pytest.fixture(scope="module")
def expected(loaded: Loaded) -> list[Answer]:
    return texts(engine_of(loaded, None))


@pytest.mark.slow
def test_with_a_pool_for_half_of_them_all_finish_with_the_same_text(
    loaded: Loaded, expected: list[Answer], tmp_path: Path
) -> None:
    stats = check(engine_of(loaded, HALF, prefix_cache_bytes=1 << 28), expected)
    assert stats.dram > 0
    assert stats.disk == stats.again == 0

    disk = AsideOnDisk(tmp_path / "aside", 1 << 28)
    stats = check(engine_of(loaded, HALF, aside=disk), expected)
    assert stats.disk > 0
    assert stats.dram == stats.again == 0
    assert not list(disk.folder.iterdir())

    stats = check(engine_of(loaded, HALF), expected)
    assert stats.again > 0


@pytest.mark.slow
def test_a_disk_that_fills_delays_the_sequence_and_nothing_else(
    loaded: Loaded, expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [3]  # writes

    def write(file: Any, part: Any, real: Any = aside_module._write) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, part)

    monkeypatch.setattr(aside_module, "_write", write)
    stats = check(engine_of(loaded, HALF, aside=AsideOnDisk(tmp_path, 1 << 28)), expected)
    assert stats.again > 0


@pytest.mark.slow
def test_log_probabilities_of_prompts_are_the_same_too(loaded: Loaded) -> None:
    alone = texts(engine_of(loaded, None), prompt_logprobs=1)
    found = texts(engine := engine_of(loaded, HALF), prompt_logprobs=1)
    stats = engine.stats().aside
    assert stats is not None
    assert stats.again > 0
    for one, other in zip(alone, found, strict=True):
        assert one.token_ids == other.token_ids
        assert one.outputs[0].prompt_logprobs == other.outputs[0].prompt_logprobs


def test_a_prompt_that_the_pool_has_no_room_for_now_waits_its_turn(loaded: Loaded) -> None:
    engine = engine_of(loaded, 1024)
    engine.start()
    try:
        first, second, third = Answer(), Answer(), Answer()
        for length, answer in ((600, first), (700, second), (5, third)):
            params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
            engine.submit([5 + i % 300 for i in range(length)], params, answer)
        third.wait()
        assert first.finish_reason is not None
        assert len(second.token_ids) >= 1, "a shorter one does not overtake it"
        second.wait()
    finally:
        engine.stop()


def test_a_sequence_that_is_aborted_while_it_is_aside_leaves_nothing(loaded: Loaded, tmp_path: Path) -> None:
    engine = engine_of(loaded, 1024, aside=AsideOnDisk(tmp_path, 1 << 28))
    engine.start()
    try:
        answers, tickets = [], []
        for _ in range(2):
            answers.append(Answer())
            params = SamplingParams(temperature=0.0, max_tokens=800, ignore_eos=True)
            tickets.append(engine.submit([5, 6, 7], params, answers[-1]))
        answers[0].wait_for_tokens(700)
        engine.abort(tickets[1])
        assert answers[1].wait().finish_reason is FinishReason.ABORT
        assert answers[0].wait().finish_reason is FinishReason.LENGTH
        stats = engine.stats().aside
        assert stats is not None
        assert (stats.disk, stats.disk_bytes) == (1, 0)
    finally:
        engine.stop()


def test_what_a_sequence_computed_itself_before_it_was_put_aside_is_not_called_cached(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SAVE_EVERY", 256)
    monkeypatch.setattr(PrefixCache, "lend", lambda *_: False)
    engine = engine_of(loaded, None, prefix_cache_bytes=1 << 28)
    prompt = [8 + 7 * i % 300 for i in range(900)]
    _, answer = behind_another(engine, [prompt], lambda: engine.pool.cache.length(1) >= 512)
    stats = engine.stats()
    assert stats.aside is not None
    assert stats.prefixes is not None
    assert stats.aside.again == 1
    if loaded.model.keeps_whole_states:
        assert stats.prefixes.cached_tokens > 0, "it went on from there"
    assert answer.outputs[0].cached_tokens == 0


def test_a_prompt_of_which_nothing_was_computed_yet_begins_with_what_is_cached_meanwhile(
    loaded: Loaded,
) -> None:
    engine = engine_of(loaded, None, prefix_cache_bytes=1 << 28)
    prompt = [8 + 7 * i % 300 for i in range(100)]
    prompts = [prompt, prompt + [9] * 150]
    _, first, second = behind_another(engine, prompts, lambda: engine.stats().running == 3)
    assert engine.stats().aside == AsideStats()
    assert first.outputs[0].cached_tokens == 0
    assert second.outputs[0].cached_tokens is not None
    assert second.outputs[0].cached_tokens >= 64


def test_a_folder_that_cannot_be_used_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no sequences can be put aside there"):
        engine_of(loaded, None, aside=AsideOnDisk(tmp_path / "file", 1 << 20))
