"""Sampling: each parameter does what its name says, and a seed makes it repeatable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.params import SamplingParams
from engine.sampling.sampler import Sampler, token_logprobs
from quant.errors import RequestError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.9])


def sampler(prompt: list[int] | None = None, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), prompt or [])


def drawn(count: int = 300, **params: Any) -> set[int]:
    chosen = sampler(seed=1, **params)
    return {chosen.sample(LOGITS) for _ in range(count)}


def test_temperature_zero_takes_the_best() -> None:
    assert drawn(temperature=0) == {0}


@pytest.mark.parametrize("temperature", [1e-4, 1e-9, 1e-300])
def test_a_tiny_temperature_is_as_good_as_zero(temperature: float) -> None:
    assert drawn(20, temperature=temperature) == {0}


def test_without_limits_every_token_is_drawn_sometimes() -> None:
    assert drawn(2000, temperature=2.0) == {0, 1, 2, 3, 4}


def test_top_k_keeps_the_k_best() -> None:
    assert drawn(top_k=2) == {0, 4}


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    probs = LOGITS.softmax(-1)
    assert drawn(top_p=float(probs[0]) - 0.01) == {0}
    assert drawn(top_p=float(probs[0]) + 0.01) == {0, 4}


def test_min_p_drops_what_is_far_less_likely_than_the_best() -> None:
    assert drawn(min_p=0.5) == {0, 4}


def test_frequencies_follow_the_softmax() -> None:
    chosen = sampler(seed=3)
    counts = torch.bincount(torch.tensor([chosen.sample(LOGITS) for _ in range(8000)]), minlength=5)
    assert torch.allclose(counts / 8000, LOGITS.softmax(-1), atol=0.03)


@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_a_seed_repeats_its_draws(seed: int) -> None:
    first, second = sampler(seed=seed), sampler(seed=seed)
    assert [first.sample(LOGITS) for _ in range(20)] == [second.sample(LOGITS) for _ in range(20)]


def test_without_a_seed_draws_differ() -> None:
    runs = {tuple(s.sample(LOGITS) for _ in range(30)) for s in (sampler() for _ in range(4))}
    assert len(runs) > 1


def test_what_ends_an_answer_is_not_drawn_before_min_tokens() -> None:
    chosen = Sampler(SamplingParams(temperature=0, min_tokens=3), [], ending={0, 4})
    assert [chosen.sample(LOGITS) for _ in range(5)] == [1, 1, 1, 0, 0]


def test_logit_bias_moves_a_token() -> None:
    assert drawn(temperature=0, logit_bias={3: 100.0}) == {3}
    assert 0 not in drawn(logit_bias={0: -100.0})


def test_presence_penalty_avoids_what_was_said_once() -> None:
    chosen = sampler(temperature=0, presence_penalty=0.5)
    assert [chosen.sample(LOGITS) for _ in range(3)] == [0, 4, 0]


def test_frequency_penalty_grows_with_each_use() -> None:
    chosen = sampler(temperature=0, frequency_penalty=0.6)
    assert [chosen.sample(LOGITS) for _ in range(5)] == [0, 4, 0, 4, 1]


def test_penalties_of_the_answer_ignore_the_prompt() -> None:
    assert sampler([0, 0, 0], temperature=0, frequency_penalty=2.0).sample(LOGITS) == 0


def test_repetition_penalty_counts_the_prompt() -> None:
    assert sampler([0], temperature=0, repetition_penalty=1.5).sample(LOGITS) == 4


def test_logprobs_are_the_models_own() -> None:
    reported = token_logprobs(LOGITS.unsqueeze(0), [2], 2)[0]
    expected = LOGITS.log_softmax(-1)
    assert reported.token_id == 2
    assert reported.logprob == pytest.approx(float(expected[2]))
    assert [i for i, _ in reported.top] == [0, 4]
    assert reported.top[0][1] == pytest.approx(float(expected[0]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be between 0 and 10"),
        ("temperature", float("nan"), "temperature must be between"),
        ("top_p", 0.0, "top_p must be greater than 0"),
        ("top_p", 1.1, "top_p must be between 0 and 1"),
        ("top_k", -1, "top_k must be 0"),
        ("min_p", 2.0, "min_p must be between 0 and 1"),
        ("frequency_penalty", 2.1, "frequency_penalty must be between -2 and 2"),
        ("presence_penalty", -3.0, "presence_penalty must be between -2 and 2"),
        ("repetition_penalty", 0.0, "repetition_penalty must be between 0.01 and 10"),
        ("max_tokens", 0, "max_tokens must be at least 1"),
        ("logprobs", 21, "top_logprobs must be between 0 and 20"),
        ("stop", ("",), "a stop string must not be empty"),
        ("logit_bias", {1: 101.0}, "logit_bias values must be between -100 and 100"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**{field: value})


def test_penalties_are_those_of_a_computation_over_the_whole_vocabulary() -> None:
    vocab, generator = 500, torch.Generator().manual_seed(4)
    prompt = torch.randint(0, vocab, (300,), generator=generator).tolist()
    answer = torch.randint(0, vocab, (200,), generator=generator).tolist()
    params = SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.25, logit_bias={3: 2.0, 499: -1.0}
    )
    subject = Sampler(params, prompt)
    for token in answer:
        subject.remember(token)
    logits = torch.randn(2, vocab, generator=generator)
    before = logits.clone()

    adjusted = subject.adjusted(logits, 1)

    expected = logits[1].clone()
    expected[3] += 2.0
    expected[499] -= 1.0
    seen = torch.zeros(vocab, dtype=torch.bool)
    seen[prompt + answer] = True
    expected = torch.where(seen, torch.where(expected > 0, expected / 1.3, expected * 1.3), expected)
    counts = torch.bincount(torch.tensor(answer), minlength=vocab)
    expected = expected - 0.5 * counts + 0.25 * (counts > 0)
    assert adjusted is not None
    assert torch.allclose(adjusted, expected, atol=1e-6)
    assert torch.equal(logits, before)


def test_numbers_that_were_looked_at_are_still_drawn_by() -> None:
    seen, unseen = sampler(seed=5), sampler(seed=5)
    ahead = seen.numbers(4)
    assert [seen.number() for _ in range(2)] == ahead[:2]
    assert seen.numbers(3)[:2] == ahead[2:]
    assert [*ahead[:2], *(seen.number() for _ in range(5))] == [unseen.number() for _ in range(7)]
