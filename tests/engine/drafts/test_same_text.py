"""Drafts change when tokens come, never which: every family, greedy and drawn, at every boundary."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.families.loader import Loaded
from tests.engine.drafts.conversations import check

# Rings, open groups, shared choices, n-grams; chosen tokens; windows; states that are copied.
QUICK = ("v41-a", "families/qwen3_next")
SLOW = (
    "v41-c", "families/deepseek_v4", "families/deepseek_v32", "families/glm_moe_dsa", "families/gpt_oss",
    "families/qwen3_5_moe", "families/qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_answers_are_the_same_with_drafts(model_of: Callable[[str], Loaded], name: str) -> None:
    drafted = accepted = 0
    for seed in range(4):
        of_this = check(model_of(name), seed, 10)
        drafted, accepted = drafted + of_this[0], accepted + of_this[1]
    assert 0 < accepted < drafted
