"""Drawing in batches gives what a plain computation over the whole, sorted vocabulary gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.draw import draw_plainly, draw_tokens
from engine.sampling.params import SamplingParams
from quant.kernels.cpu.draws import native_draws

VOCAB = 3000
WAYS = [draw_plainly, draw_tokens] if native_draws() is not None else [draw_plainly]

either = pytest.mark.parametrize("draw", WAYS, ids=lambda draw: draw.__name__)
Drawing = Callable[[torch.Tensor, Sequence[SamplingParams], Sequence[float]], list[int]]


def logits_of(seed: int, rows: int, spread: float) -> torch.Tensor:
    return spread * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def plainly(logits: torch.Tensor, params: SamplingParams, number: float) -> set[int]:
    """The definition: sort everything, cut, and walk to the number; next to a border, rounding decides."""
    if params.temperature == 0:
        return {int(logits.argmax())}
    probs = (logits.double() / params.temperature).softmax(-1)
    is_cut = 0 < params.top_k < VOCAB or params.top_p < 1 or params.min_p > 0
    ids = probs.argsort(descending=True) if is_cut else torch.arange(VOCAB)
    kept = probs[ids]
    if 0 < params.top_k < VOCAB:
        kept[params.top_k :] = 0
        kept /= kept.sum()
    kept[kept.cumsum(-1) - kept >= params.top_p] = 0
    kept[kept < params.min_p * kept.max()] = 0
    sums = kept.cumsum(-1) / kept.sum()
    first, last = (int((sums <= number + d).sum()) for d in (-1e-5, 1e-5))
    return {int(i) for i in ids[max(first - 1, 0) : last + 2]}


a_request = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.2, 1.0, 3.0]),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
        "top_k": st.sampled_from([0, 1, 5, 64, 65, 1000, 2999, 5000]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    }
)


@either
@settings(max_examples=100)
@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.05, 1.0, 6.0]),
    requests=st.lists(a_request, min_size=1, max_size=6),
    number=st.floats(0, 1, exclude_max=True),
)
def test_a_batch_draws_what_the_definition_says(
    draw: Drawing, seed: int, spread: float, requests: list[dict[str, Any]], number: float
) -> None:
    logits = logits_of(seed, len(requests), spread)
    params = [SamplingParams(**request) for request in requests]

    tokens = draw(logits, params, [number] * len(params))

    for row, (token, wanted) in enumerate(zip(tokens, params, strict=True)):
        assert token in plainly(logits[row], wanted, number)


@either
@given(
    seed=st.integers(0, 1000), requests=st.lists(a_request, min_size=2, max_size=6), has_ties=st.booleans()
)
def test_a_row_does_not_depend_on_the_others(
    draw: Drawing, seed: int, requests: list[dict[str, Any]], has_ties: bool
) -> None:
    logits = logits_of(seed, len(requests), 2.0)
    if has_ties:
        logits = logits.round()
    params = [SamplingParams(**request) for request in requests]
    numbers = torch.rand(len(params), generator=torch.Generator().manual_seed(seed)).tolist()

    together = draw(logits, params, numbers)

    alone = [draw(logits[i : i + 1], [p], [numbers[i]])[0] for i, p in enumerate(params)]
    assert together == alone


@either
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}])
def test_tokens_that_cannot_be_are_never_drawn(draw: Drawing, params: dict[str, Any]) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 17] = -3.0

    for number in (0.0, 0.5, 1 - 1e-16):
        assert draw(logits, [SamplingParams(**params)], [number]) == [17]


@either
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}])
def test_a_row_without_numbers_is_told_and_spoils_no_other(draw: Drawing, params: dict[str, Any]) -> None:
    logits = logits_of(1, 3, 2.0)
    logits[1, 5] = torch.nan
    expected = draw(logits_of(1, 3, 2.0), [SamplingParams(**params)] * 3, [0.5] * 3)

    assert draw(logits, [SamplingParams(**params)] * 3, [0.5] * 3) == [expected[0], -1, expected[2]]


@pytest.mark.skipif(len(WAYS) == 1, reason="the compiled kernels were not built")
def test_threads_change_no_token_of_a_large_vocabulary() -> None:
    logits = 3 * torch.randn(4, 129_280, generator=torch.Generator().manual_seed(5))
    params = [
        SamplingParams(**wanted) for wanted in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 40})
    ]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found += [draw_tokens(logits, params, [number] * 4) for number in (0.2, 0.9)]
    finally:
        torch.set_num_threads(threads)

    assert found[:2] == found[2:4] == found[4:]
