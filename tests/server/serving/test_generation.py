"""The sequences of a request as its handler sees them."""

from __future__ import annotations

import asyncio

from engine.engine import PromptProgress, Submission
from engine.sampling.params import SamplingParams
from server.metrics import Metrics
from server.serving.generation import Generation
from server.serving.wakeups import Wakeups


class Falling:
    """An engine that puts a prompt aside and computes it again."""

    def __init__(self) -> None:
        self._left = [None, 4, 8, 0, None, 4, 9]

    def submit(self, *_: object, **__: object) -> Submission:
        return Submission(1)

    def prompt_progress(self, ticket: Submission) -> PromptProgress | None:
        processed = self._left.pop(0)
        return None if processed is None else PromptProgress(10, 0, processed)


def test_progress_does_not_fall_when_a_prompt_is_computed_again() -> None:
    async def seen() -> list[PromptProgress | None]:
        generation = Generation(Falling(), Metrics(), Wakeups(0), None, "")  # type: ignore[arg-type]
        generation.submit([5] * 10, SamplingParams())
        return [generation.prompt_progress() for _ in range(7)]

    processed = [each and each.processed for each in asyncio.run(seen())]
    assert processed == [None, 4, 8, 8, 8, 8, 9]
