"""Sequences that begin together while an older one grows, and a pool that fails when it is to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.cache.pages import PoolShortError
from engine.engine import Engine
from engine.output import Output
from engine.sampling.params import SamplingParams
from tests.engine.chat.answers import Answer

GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
SHORT = PoolShortError("the KV pool has no room")


class Leading(Answer):
    """An answer at whose first token others are asked for, which so begin in the same step."""

    def __init__(self, ask: Callable[[], None]) -> None:
        super().__init__()
        self._ask = ask

    def __call__(self, output: Output) -> None:
        is_first = not self.outputs
        super().__call__(output)
        if is_first:
            self._ask()


def behind_another(
    engine: Engine,
    prompts: list[list[int]],
    fails: Callable[[], bool] = lambda: False,
    error: Exception = SHORT,
    *,
    slot: int = 0,
    times: int = 1,
) -> list[Answer]:
    """The answers of a sequence that grows, in slot 0, and to prompts that are asked for at once behind it.

    fails  from when on the pool has no pages for one of the slots, so many times
    """
    pages, left = engine.pool.cache.pages, [times]
    hold, answers = pages.hold, [Answer() for _ in prompts]

    def hold_or_not(asked: int, tokens: int) -> None:
        if asked == slot and left[0] and fails():
            left[0] -= 1
            raise error
        hold(asked, tokens)

    def ask() -> None:
        for prompt, answer in zip(prompts, answers, strict=True):
            engine.submit(prompt, replace(GREEDY, max_tokens=4), answer)

    pages.hold = hold_or_not  # type: ignore[method-assign, assignment]
    engine.start()
    try:
        first = Leading(ask)
        engine.submit([5, 6, 7], GREEDY, first)
        return [answer.wait() for answer in (first, *answers)]
    finally:
        engine.stop()
