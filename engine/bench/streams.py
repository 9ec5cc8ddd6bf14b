"""Streams measured: when each piece of an answer arrived, and the bare engine as what to compare with."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.output import Output
from engine.sampling.params import SamplingParams
from quant.errors import LociError

# Ordinary tokens of every vocabulary there is; special ones lie at its ends.
TOKEN_IDS = range(100, 1000)


@dataclass
class Timeline:
    """One stream: when it was asked for, and when its pieces came, in seconds of one clock.

    tokens is what the answer has in all; several may come in one piece.
    """

    sent_s: float = field(default_factory=time.perf_counter)
    arrivals_s: list[float] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between pieces, each of which may have several tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals_s)]

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / max(1, self.tokens - 1)

    @property
    def latency_s(self) -> float:
        """From sending to the last piece."""
        return self.arrivals_s[-1] - self.sent_s


def throughput(timelines: Sequence[Timeline]) -> float:
    """Output tokens per second of streams that ran together, from the first request to the last token."""
    began = min(t.sent_s for t in timelines)
    return sum(t.tokens for t in timelines) / (max(t.arrivals_s[-1] for t in timelines) - began)


def decode_rate(timelines: Sequence[Timeline]) -> float:
    """Output tokens per second of all streams together while all were generating: from the moment the last of
    them had its first token until the first of them ended.

    Raises LociError where there was no such time.
    """
    began = max(t.arrivals_s[0] for t in timelines)
    ended = min(t.arrivals_s[-1] for t in timelines)
    if ended <= began:
        raise LociError("the streams did not run at the same time; let them generate more tokens")
    # A first token comes by itself; other pieces may have several, or none.
    tokens = (
        (t.tokens - 1) / (len(t.arrivals_s) - 1) * sum(began < at <= ended for at in t.arrivals_s[1:])
        for t in timelines
    )
    return sum(tokens) / (ended - began)


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that `percent` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class StepCost:
    """What engine steps took on top of the model's forward pass."""

    overhead_s: float
    steps: int

    @property
    def overhead_us(self) -> float:
        """Microseconds a step."""
        return 1e6 * self.overhead_s / max(1, self.steps)


def run_engine(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[list[Timeline], StepCost]:
    """Submit all prompts at once and wait for their answers."""
    before = engine.stats()
    done = threading.Semaphore(0)
    timelines = [Timeline() for _ in prompts]
    for prompt, timeline in zip(prompts, timelines, strict=True):
        engine.submit(prompt, params, _note(timeline, done.release))
    for _ in prompts:
        done.acquire()
    after = engine.stats()
    overhead = (after.step_s - before.step_s) - (after.forward_s - before.forward_s)
    return timelines, StepCost(overhead, after.steps - before.steps)


def _note(timeline: Timeline, when_done: Callable[[], None]) -> Callable[[Output], None]:
    def on_output(output: Output) -> None:
        timeline.arrivals_s.append(time.perf_counter())
        timeline.tokens += len(output.token_ids)
        if output.finish_reason is not None:
            timeline.finish_reason = output.finish_reason.value
            when_done()

    return on_output
