"""The step loop on a real (tiny) model: many sequences, limits, aborts, failures."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.engine import Engine, Submission
from engine.families.base import Batch, KvCache
from engine.families.loader import Loaded, load
from engine.output import FinishReason, Output
from engine.sampling.params import SamplingParams
from quant.errors import BudgetError, CapacityError, RequestError
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(golden_path("v41-c"))


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(golden_path("v41-c") / "expected.safetensors")


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[Engine]:
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=3, max_context=200, prefill_chunk=64)
    engine.start()
    yield engine
    engine.stop()


def submit(engine: Engine, ids: list[int], **params: Any) -> tuple[Answer, Submission]:
    answer = Answer()
    return answer, engine.submit(ids, SamplingParams(**{"temperature": 0.0, **params}), answer)


def test_more_sequences_than_slots_all_get_the_greedy_answer(
    engine: Engine, expected: dict[str, torch.Tensor]
) -> None:
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    answers = [submit(engine, ids, max_tokens=12, ignore_eos=True)[0] for _ in range(7)]
    for answer in answers:
        assert answer.wait().token_ids == greedy
        assert answer.finish_reason is FinishReason.LENGTH


def test_an_answer_does_not_depend_on_its_company(engine: Engine, expected: dict[str, torch.Tensor]) -> None:
    ids = expected["input_ids"].tolist()
    params = {"temperature": 1.0, "seed": 7, "max_tokens": 20, "ignore_eos": True}
    alone = submit(engine, ids[:50], **params)[0].wait().token_ids
    company = [submit(engine, ids[:n], **params)[0] for n in (3, 50, 120, 50)]
    found = [answer.wait().token_ids for answer in company]
    assert found[1] == found[3] == alone
    assert found[0] != alone


def test_the_text_is_the_text_of_the_tokens(engine: Engine, loaded: Loaded, expected: dict[str, Any]) -> None:
    answer = submit(engine, expected["input_ids"].tolist()[:20], max_tokens=30, ignore_eos=True)[0].wait()
    assert answer.text == loaded.tokenizer.decode(answer.token_ids)
    assert len(answer.token_ids) == 30


def test_a_stop_token_ends_the_answer_and_is_not_text(
    engine: Engine, loaded: Loaded, expected: dict[str, torch.Tensor]
) -> None:
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    answer = submit(engine, ids, max_tokens=12, ignore_eos=True, stop_token_ids=(greedy[3],))[0].wait()
    assert answer.token_ids == greedy[:4]
    assert answer.text == loaded.tokenizer.decode(greedy[:3])
    assert (answer.finish_reason, answer.outputs[-1].stop_match) == (FinishReason.STOP, greedy[3])


def test_a_stop_string_ends_the_answer(engine: Engine, loaded: Loaded, expected: dict[str, Any]) -> None:
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    whole = loaded.tokenizer.decode(greedy)
    stop = whole[5:8]
    answer = submit(engine, ids, max_tokens=12, ignore_eos=True, stop=(stop,))[0].wait()
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.outputs[-1].stop_match) == (FinishReason.STOP, stop)


def test_the_end_of_sequence_token_stops_unless_it_is_ignored(
    engine: Engine, expected: dict[str, Any]
) -> None:
    ids = expected["input_ids"].tolist()
    push = {1: 100.0}  # the checkpoint's eos_token_id
    assert submit(engine, ids, max_tokens=5, logit_bias=push)[0].wait().token_ids == [1]
    ignored = submit(engine, ids, max_tokens=5, logit_bias=push, ignore_eos=True)[0].wait()
    assert ignored.token_ids == [1] * 5


def test_no_token_ends_an_answer_before_min_tokens(engine: Engine, expected: dict[str, Any]) -> None:
    ids = expected["input_ids"].tolist()
    push = {"logit_bias": {1: 100.0, 7: 90.0}, "min_tokens": 3}  # 1 is the checkpoint's eos_token_id
    assert submit(engine, ids, max_tokens=9, **push)[0].wait().token_ids == [7, 7, 7, 1]
    stopped = submit(engine, ids, max_tokens=9, stop_token_ids=(7,), **push)[0].wait()
    assert set(stopped.token_ids[:3]).isdisjoint({1, 7})
    assert stopped.token_ids[3:] == [1]


def test_a_stop_string_is_not_looked_for_before_min_tokens(
    engine: Engine, loaded: Loaded, expected: dict[str, Any]
) -> None:
    ids = expected["input_ids"].tolist()
    push = {"logit_bias": {300: 100.0}, "ignore_eos": True}
    text = loaded.tokenizer.decode([300])
    answer = submit(engine, ids, max_tokens=9, stop=(text,), min_tokens=4, **push)[0].wait()
    assert (answer.text, len(answer.token_ids)) == (text * 4, 5)
    assert answer.finish_reason is FinishReason.STOP


def test_an_answer_ends_where_the_context_does(engine: Engine, expected: dict[str, torch.Tensor]) -> None:
    answer = submit(engine, expected["input_ids"].tolist(), ignore_eos=True)[0].wait()
    assert len(answer.token_ids) == 200 - 150
    assert answer.finish_reason is FinishReason.LENGTH


def test_logprobs_of_prompt_and_answer_are_the_references(
    engine: Engine, expected: dict[str, torch.Tensor]
) -> None:
    ids = expected["input_ids"].tolist()
    answer = submit(engine, ids, max_tokens=1, logprobs=3, prompt_logprobs=0, ignore_eos=True)[0].wait()
    reference = expected["logits"].log_softmax(-1)
    prompt = answer.outputs[0].prompt_logprobs
    assert prompt is not None
    assert prompt[0] is None
    assert [p.token_id for p in prompt if p is not None] == ids[1:]
    for position, found in enumerate(prompt[1:]):
        assert found is not None
        assert found.logprob == pytest.approx(float(reference[position, ids[position + 1]]), abs=1e-4)
    first = answer.outputs[0].logprobs[0]
    best = reference[-1].topk(3)
    assert [i for i, _ in first.top] == best.indices.tolist()
    assert first.logprob == pytest.approx(float(best.values[0]), abs=1e-4)


def test_an_abort_frees_the_slot(engine: Engine, expected: dict[str, torch.Tensor]) -> None:
    ids = expected["input_ids"].tolist()[:10]
    running = [submit(engine, ids, ignore_eos=True) for _ in range(3)]
    waiting, _ = submit(engine, ids, max_tokens=2, ignore_eos=True)
    running[0][0].wait_for_tokens(1)
    for _, ticket in running:
        engine.abort(ticket)
    for answer, _ in running:
        assert answer.wait().finish_reason is FinishReason.ABORT
    assert waiting.wait().finish_reason is FinishReason.LENGTH
    assert engine.stats().running == 0
    assert engine.stats().kv_tokens_used == 0


def test_aborting_what_has_ended_does_nothing(engine: Engine) -> None:
    answer, ticket = submit(engine, [5, 6], max_tokens=1, ignore_eos=True)
    answer.wait()
    engine.abort(ticket)
    assert submit(engine, [5, 6], max_tokens=1, ignore_eos=True)[0].wait().token_ids == answer.token_ids


def test_stopping_aborts_what_runs(loaded: Loaded) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=2000)
    engine.start()
    running, queued = (submit(engine, [5, 6, 7], ignore_eos=True)[0] for _ in range(2))
    running.wait_for_tokens(1)
    engine.stop()
    assert running.finish_reason is FinishReason.ABORT
    assert queued.finish_reason is FinishReason.ABORT
    assert not engine.is_alive
    with pytest.raises(CapacityError, match="not running"):
        submit(engine, [5], max_tokens=1)


def test_a_failed_step_fails_its_sequences_and_the_engine_goes_on(
    engine: Engine, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> torch.Tensor:
        raise BudgetError("no room for the moment")

    with monkeypatch.context() as broken:
        broken.setattr(loaded.model, "forward", failing)
        answer = submit(engine, [5, 6, 7], max_tokens=3)[0].wait()
    assert answer.finish_reason is FinishReason.ERROR
    assert answer.outputs[-1].error == "no room for the moment"
    assert len(submit(engine, [5, 6, 7], max_tokens=3, ignore_eos=True)[0].wait().token_ids) == 3


@pytest.mark.parametrize("part", ["sampler", "detokenizer", "reader"])
def test_what_fails_for_one_sequence_fails_no_other(
    engine: Engine, part: str, expected: dict[str, torch.Tensor]
) -> None:
    """A reader that fails keeps the others' answers whole; its own sequence goes on to its end."""
    ids, greedy = expected["input_ids"].tolist(), expected["greedy_ids"].tolist()
    good, _ = submit(engine, ids, max_tokens=12, ignore_eos=True)
    bad = Answer()

    def broken(*_: object) -> Any:
        bad(Output(finish_reason=FinishReason.ERROR))
        raise ZeroDivisionError("of one sequence")

    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.submit(ids, params, broken if part == "reader" else bad)
    if part != "reader":
        (sequence,) = [s for s in engine._known.values() if s.on_output is bad]
        if part == "sampler":
            sequence.sampler.adjusted = broken  # type: ignore[method-assign,assignment]
        else:
            sequence.detokenizer.push = broken  # type: ignore[method-assign,assignment]
    bad.wait()

    assert bad.outputs[-1].finish_reason is FinishReason.ERROR
    assert good.wait().token_ids == greedy
    assert submit(engine, ids, max_tokens=12, ignore_eos=True)[0].wait().token_ids == greedy
    assert engine.stats().running == 0


def test_logits_that_are_no_numbers_fail_their_sequence(
    engine: Engine, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = loaded.model.forward

    def poisoned(batch: Batch, cache: KvCache) -> torch.Tensor:
        logits = forward(batch, cache).clone()
        logits[0, 7] = torch.nan
        return logits

    with monkeypatch.context() as broken:
        broken.setattr(loaded.model, "forward", poisoned)
        for temperature in (0.0, 1.0):
            answer = submit(engine, [5, 6, 7], temperature=temperature)[0].wait()
            assert answer.finish_reason is FinishReason.ERROR
            assert "the model produced NaN" in (answer.outputs[-1].error or "")


def test_a_step_loop_that_dies_ends_everything_and_says_so(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=200)
    monkeypatch.setattr("threading.excepthook", lambda _: None)

    def dying(*_: object) -> torch.Tensor:
        raise SystemExit

    with monkeypatch.context() as broken:
        broken.setattr(loaded.model, "forward", dying)
        engine.start()
        answer = submit(engine, [5, 6, 7])[0]
        engine._thread.join()

    assert answer.finish_reason is FinishReason.ABORT
    assert not engine.is_alive
    with pytest.raises(CapacityError, match="not running"):
        submit(engine, [5])


def test_a_full_queue_refuses(loaded: Loaded) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=2000, max_waiting=1)
    engine.start()
    try:
        for _ in range(2):
            submit(engine, [5, 6], ignore_eos=True)
        with pytest.raises(CapacityError, match="1 requests are running and 1 are already waiting"):
            submit(engine, [5, 6], ignore_eos=True)
    finally:
        engine.stop()


@pytest.fixture
def unqueued(loaded: Loaded) -> Iterator[Engine]:
    """An engine with two slots and no queue."""
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=2, max_context=2000, max_waiting=0)
    engine.start()
    yield engine
    engine.stop()


def test_without_a_queue_free_slots_are_given_away(unqueued: Engine) -> None:
    for _ in range(20):
        for answer, _ in [submit(unqueued, [5, 6], max_tokens=2) for _ in range(2)]:
            answer.wait()


def test_an_aborted_sequence_takes_no_place_from_the_next(unqueued: Engine) -> None:
    running = [submit(unqueued, [5, 6], ignore_eos=True) for _ in range(2)]
    for _ in range(20):
        with pytest.raises(CapacityError, match="0 are already waiting"):
            submit(unqueued, [5, 6])
        unqueued.abort(running.pop(0)[1])
        running.append(submit(unqueued, [5, 6], ignore_eos=True))

    running[-1][0].wait_for_tokens(1)


def test_whoever_has_an_answer_may_ask_at_once(unqueued: Engine) -> None:
    last = Answer()

    def ask(left: int) -> None:
        def read(output: Output) -> None:
            if output.finish_reason is None:
                return
            if left:
                ask(left - 1)
            else:
                last(output)

        unqueued.submit([5, 6], SamplingParams(max_tokens=1), read)

    for _ in range(2):
        ask(10)
    assert last.wait().finish_reason is FinishReason.LENGTH


def test_as_many_clients_as_places_are_never_refused(loaded: Loaded) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=2, max_context=200, max_waiting=3)
    engine.start()

    def client(seed: int) -> int:
        for i in range(15):
            answer, submission = submit(engine, [5, 6, seed], max_tokens=1 + (seed + i) % 3, ignore_eos=True)
            if (seed + i) % 4 == 0:
                engine.abort(submission)
            answer.wait()
        return seed

    try:
        with ThreadPoolExecutor(5) as clients:
            assert list(clients.map(client, range(5))) == list(range(5))
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1024], {}, "token ids must lie between 0 and 1023"),
        ([-1], {}, "token ids must lie between 0 and 1023"),
        ([5] * 200, {}, "maximum context length is 200 tokens, but 201 were requested"),
        ([5] * 100, {"max_tokens": 101}, "maximum context length is 200 tokens, but 201 were requested"),
        ([5], {"logit_bias": {1024: 1.0}}, "logit_bias: token id 1024"),
        ([5], {"stop_token_ids": (5000,)}, "stop_token_ids: token id 5000"),
        ([5], {"stop_token_ids": tuple(range(1024)), "min_tokens": 1}, "min_tokens cannot be met"),
        ([5] * 100, {"min_tokens": 101}, "maximum context length is 200 tokens, but 201 were requested"),
    ],
)
def test_a_request_that_cannot_work_is_refused(
    engine: Engine, ids: list[int], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        submit(engine, ids, **params)


def test_counters_add_up(engine: Engine) -> None:
    for _ in range(2):
        submit(engine, [5, 6, 7], max_tokens=4, ignore_eos=True)[0].wait()
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (6, 8)
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_tokens_capacity == 3 * 200
    assert stats.kv_bytes == engine.model.cache_bytes(3, 200)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_allocated(loaded: Loaded) -> None:
    with pytest.raises(BudgetError, match="lower --kv-budget, --max-model-len, --max-num-seqs or"):
        Engine(loaded.model, loaded.tokenizer, max_sequences=10**9, max_context=2000)


def test_waiting_sequences_go_on_when_all_running_ones_end_in_the_same_step(loaded: Loaded) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=2, max_context=200)
    engine.start()
    try:
        answers = [submit(engine, [5, 6, 7], max_tokens=1, ignore_eos=True)[0] for _ in range(6)]
        for answer in answers:
            assert answer.wait().finish_reason is FinishReason.LENGTH
    finally:
        engine.stop()


def test_what_was_reported_is_followed_by_a_call_between_steps(loaded: Loaded) -> None:
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=200)
    seen: list[str] = []
    engine.between_steps = lambda: seen.append("between")
    engine.start()
    answers = [Answer(), Answer()]

    for answer in answers:

        def note(output: Output, answer: Answer = answer) -> None:
            seen.append("output")
            answer(output)

        engine.submit([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=150), note)
    answers[0].wait()
    engine.stop()

    assert seen.count("output") > 2
    assert seen[-1] == "between"
