"""Random conversations, answered with and without drafts: prompts that go on from earlier ones, aborts,
several at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.drafts.base import NOTHING, Draft, Drafter, DraftRequest, Rows
from engine.drafts.lookup import LookupDrafter
from engine.engine import Engine
from engine.families.loader import Loaded
from engine.output import FinishReason
from engine.sampling.params import SamplingParams
from tests.engine.chat.answers import Answer

CONTEXT = 200


@dataclass
class Turn:
    """A request: what it says behind what it goes on from, and when its client leaves."""

    said: list[int]
    goes_on_from: int | None = None  # an earlier turn, with its answer
    aborts_after: int | None = None  # tokens
    params: dict[str, Any] = field(default_factory=dict)


def some_turns(rng: random.Random, count: int, vocab: int, *, greedy: bool) -> list[Turn]:
    """Turns of a few conversations, some of whose prompts repeat themselves."""
    turns: list[Turn] = []
    for number in range(count):
        said = [rng.randrange(5, vocab - 5) for _ in range(rng.randint(1, 25))]
        if rng.random() < 0.5:
            said += said[rng.randrange(len(said)) :]
        earlier = rng.randrange(number) if number and rng.random() < 0.6 else None
        aborts = rng.randint(1, 12) if rng.random() < 0.15 else None
        params: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "ignore_eos": rng.random() < 0.7}
        if not greedy:
            params |= {
                "seed": number,
                "temperature": rng.choice([0.0, 0.5, 1.0]),
                "top_p": rng.choice([1.0, 0.9]),
            }
            if rng.random() < 0.4:
                params |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2}
            if rng.random() < 0.3:
                params |= {"logprobs": 2}
            if rng.random() < 0.3:
                params |= {"min_tokens": 1, "logit_bias": {7: 4.0, 9: -5.0}}
        else:
            params |= {"temperature": 0.0}
        turns.append(Turn(said, earlier, aborts, params))
    return turns


class HalfRight:
    """A drafter that knows the answers, and lies now and then."""

    name = "model"
    longest = 15
    wants_captures = False
    is_whole = True
    nbytes = 0

    def __init__(self, rng: random.Random, vocab: int) -> None:
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self._rng, self._vocab = rng, vocab
        self._prompts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self.open_now = 0

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        self._prompts.setdefault(sequence_id, len(token_ids))
        self.open_now += 1

    def close(self, sequence_id: int) -> None:
        self._ends.pop(sequence_id, None)
        self.open_now -= 1

    def observe(self, computed: Sequence[Rows]) -> None:
        for rows in computed:  # of each sequence every token is told once, in order
            assert rows.start == self._ends.get(rows.sequence_id, rows.start)
            self._ends[rows.sequence_id] = rows.start + len(rows.token_ids)

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> Draft:
        begin = self._prompts[request.sequence_id]
        known = self.answers.get(tuple(request.token_ids[:begin]))
        if known is None:
            return NOTHING
        right = known[len(request.token_ids) - begin :][: request.most]
        count = self._rng.randint(0, len(right))
        wrong = [self._rng.randrange(5, self._vocab - 5) for _ in range(request.most - count)]
        return Draft(tuple(right[:count] + wrong[: self._rng.randint(0, len(wrong))]))


def answered(
    loaded: Loaded,
    turns: Sequence[Turn],
    prompts: list[list[int]] | None = None,
    watch: Callable[[Engine], None] | None = None,
    **options: Any,
) -> tuple[list[Answer], list[list[int]]]:
    """The answers and the prompts, which are made of earlier answers where none are given. Three turns run at
    once where that is possible."""
    engine = Engine(
        loaded.model, loaded.tokenizer, max_sequences=3, max_context=CONTEXT, prefill_chunk=40,
        prefix_cache_bytes=1 << 24, **options,
    )  # fmt: skip
    engine.start()
    answers: list[Answer] = []
    made: list[list[int]] = []
    try:
        for number, turn in enumerate(turns):
            if prompts is None:
                before: list[int] = []
                if turn.goes_on_from is not None:
                    earlier = answers[turn.goes_on_from].wait()
                    before = made[turn.goes_on_from] + earlier.token_ids
                made.append((before + turn.said)[-(CONTEXT - 30) :])
            else:
                made.append(prompts[number])
            answers.append(Answer())
            ticket = engine.submit(made[-1], SamplingParams(**turn.params), answers[-1])
            if prompts is not None and turn.aborts_after is not None:
                answers[-1].wait_for_tokens_or_end(turn.aborts_after)
                engine.abort(ticket)
            if number >= 3:
                answers[number - 3].wait()
        for answer in answers:
            answer.wait()
    finally:
        engine.stop()
    if watch is not None:
        watch(engine)
    return answers, made


def check(
    loaded: Loaded,
    seed: int,
    count: int,
    *,
    greedy: bool = False,
    drafter: str = "both",
    small: Drafter | None = None,
) -> tuple[int, int]:
    """Answer the turns without drafts and with, and compare all that a client sees; drafted and accepted
    tokens. small: who drafts instead."""
    rng = random.Random(seed)
    vocab = loaded.model.info.vocab_size
    turns = some_turns(rng, count, vocab, greedy=greedy)
    expected, prompts = answered(loaded, turns)
    knowing = HalfRight(rng, vocab)
    for prompt, answer in zip(prompts, expected, strict=True):
        knowing.answers[tuple(prompt)] = answer.token_ids
    drafters: list[Drafter] = [knowing]
    if drafter == "lookup" or (drafter == "both" and rng.random() < 0.3):
        drafters = [LookupDrafter()]
    if small is not None:
        drafters = [small]
    longest = rng.choice([1, 2, 4, 7, 15])
    engine_options: dict[str, Any] = {"drafters": drafters, "draft_tokens": longest}
    if rng.random() < 0.8:
        engine_options["always_draft"] = rng.randint(1, longest)
    engines: list[Engine] = []
    found, _ = answered(loaded, turns, prompts, watch=engines.append, **engine_options)
    for turn, one, other in zip(turns, expected, found, strict=True):
        if turn.aborts_after is not None and other.finish_reason == FinishReason.ABORT:
            assert other.token_ids == one.token_ids[: len(other.token_ids)]
            continue
        assert other.token_ids == one.token_ids
        assert other.text == one.text
        assert other.finish_reason == one.finish_reason
        assert [o.logprobs for o in other.outputs] == [o.logprobs for o in one.outputs]
    assert knowing.open_now == 0
    (stats,) = [engine.stats().drafts for engine in engines]
    assert stats is not None
    totals = stats.by_drafter.values()
    return sum(one.drafted for one in totals), sum(one.accepted for one in totals)
