"""Popularity of experts: chances that add up, hit rates that grow with skew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.families.released import released_shape
from memory.experts.traces import RoutingTrace
from memory.planner.routing import (
    MEASURED_SKEW,
    SKEWED,
    UNIFORM,
    Routing,
    any_used,
    distinct,
    from_counts,
    of_trace,
)
from memory.planner.shape import KvShape, LayerShape, Weights
from quant.errors import CheckpointError

# Share of V4.1-Flash's experts that are held -> share of picks that they take, as published.
PUBLISHED = {0.30: 0.712, 0.40: 0.802, 0.44: 0.831, 0.50: 0.869, 0.60: 0.921, 0.75: 0.972}


@given(st.floats(0, 12), st.integers(1, 500), st.integers(1, 16))
def test_chances_add_up_to_top_k_and_none_is_above_one(skew: float, experts: int, top_k: int) -> None:
    chances = Routing("any", "", skew).picks(0, experts, top_k)
    assert chances.sum() == pytest.approx(min(top_k, experts))
    assert np.all((chances >= 0) & (chances <= 1))
    assert np.all(np.diff(chances) <= 1e-12)


def test_uniform_routing_hits_as_often_as_experts_are_held() -> None:
    chances = UNIFORM.picks(0, 384, 6)
    assert chances[:96].sum() / 6 == pytest.approx(0.25)


@pytest.mark.parametrize(("held", "hit"), PUBLISHED.items())
def test_the_measured_skew_is_that_of_the_published_trace(held: float, hit: float) -> None:
    chances = SKEWED.picks(0, 384, 6)
    assert chances[: round(held * 384)].sum() / 6 == pytest.approx(hit, abs=0.015)
    assert SKEWED.skew == MEASURED_SKEW


@given(st.integers(1, 383))
def test_more_skew_hits_more_often(held: int) -> None:
    rates = [Routing("any", "", skew).picks(0, 384, 6)[:held].sum() for skew in (0.0, 1.0, 4.0, 8.0)]
    assert rates == sorted(rates)


def test_a_trace_replaces_the_formula_where_it_says_something() -> None:
    traced = from_counts([[0, 90, 10, 0], []], "a trace")
    assert traced.picks(0, 4, 1).tolist() == pytest.approx([0.9, 0.1, 0.0, 0.0])
    assert traced.picks(1, 4, 1).tolist() == [0.25] * 4
    assert traced.picks(7, 4, 1).tolist() == [0.25] * 4


def test_an_expert_picked_by_every_token_leaves_the_rest_to_others() -> None:
    assert from_counts([[98, 1, 1]], "a trace").picks(0, 3, 2).tolist() == pytest.approx([1.0, 0.5, 0.5])


def test_a_trace_of_fewer_experts_than_are_picked_still_adds_up() -> None:
    assert from_counts([[5, 0, 0, 0]], "a trace").picks(0, 4, 2).sum() == pytest.approx(2)


def test_several_tokens_share_experts() -> None:
    chances = UNIFORM.picks(0, 256, 6)
    assert distinct(chances, 1) == pytest.approx(6)
    assert distinct(chances, 8) == pytest.approx(256 * (1 - (1 - 6 / 256) ** 8))
    assert distinct(SKEWED.picks(0, 256, 6), 8) < distinct(chances, 8)


def test_the_chance_that_any_of_some_experts_is_used() -> None:
    chances = np.array([0.5, 0.5])
    assert any_used(chances, 1) == pytest.approx(0.75)
    assert any_used(chances, 2) == pytest.approx(1 - 0.25**2)
    assert any_used(np.array([]), 9) == 0.0
    assert any_used(np.array([1.0]), 1) == pytest.approx(1.0)


def trace_of(*tokens: list[list[int]]) -> RoutingTrace:
    return RoutingTrace(torch.tensor(tokens))


def test_a_recorded_trace_counts_for_the_layers_that_have_experts() -> None:
    plain, mixed = LayerShape(Weights(), KvShape()), LayerShape(Weights(), KvShape(), experts=4)
    shape = replace(released_shape("deepseek-v4-flash"), layers=(plain, mixed, mixed), top_k=2)
    routing = of_trace(trace_of([[0, 1], [2, 3]], [[0, 2], [2, 3]]), shape, "trace")
    assert routing.counts == ((), (0.5, 0.25, 0.25, 0.0), (0.0, 0.0, 0.5, 0.5))
    assert routing.picks(1, 4, 2).tolist() == pytest.approx([1.0, 0.5, 0.5, 0.0])


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="covers 2 layers, but deepseek-v4-flash has 43"):
        of_trace(trace_of([[0, 1], [2, 3]]), released_shape("deepseek-v4-flash"), "trace")
