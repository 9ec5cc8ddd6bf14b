"""A decode step of one stream: the time inside the compiled kernels, and what the rest of it goes to.

Watching takes time of its own. So how long a step is comes from answers that nobody watches, in turn with
those that are watched.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from engine.bench.streams import TOKEN_IDS
from engine.bench.watch import KERNELS, LOOP, Watch
from engine.engine import Engine
from engine.output import Output
from engine.sampling.params import SamplingParams
from memory.planner.shape import ModelShape
from quant.errors import LociError

PROMPT_TOKENS = 32
UNCOUNTED = 2  # outputs: the prompt's step reports the first one, and the clock starts between two steps
# What the host does in a step, as reports list it; the forward's part is what it does outside kernels.
PARTS = (
    "forward", "waiting", "scheduling", "assembling", "sampling", "prefetching", "detokenising", "output",
    LOOP,
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What the steps of one answer took on average.

    step_s   from one token to the next
    seconds  by part and kernel, calls likewise; empty where nobody watched
    """

    step_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)

    @property
    def kernels_s(self) -> float:
        """Inside compiled kernels, with calling them."""
        return sum(self.seconds.get(name, 0.0) for name in KERNELS)


@dataclass(frozen=True)
class StepTimes:
    """Two answers a round, one of them watched, and a plain read of memory between them.

    read_bytes_per_s  of the plain reads, by round
    """

    plain: list[Answer]
    watched: list[Answer]
    read_bytes_per_s: list[float]

    @property
    def step_s(self) -> float:
        """Duration of a step, not watched."""
        return median(answer.step_s for answer in self.plain)

    @property
    def kernel_share(self) -> float:
        """Of a step, the part inside kernels."""
        pairs = zip(self.watched, self.plain, strict=True)
        return median(watched.kernels_s / plain.step_s for watched, plain in pairs)

    @property
    def watching_s(self) -> float:
        """By which watching made a step longer."""
        pairs = zip(self.watched, self.plain, strict=True)
        return median(watched.step_s - plain.step_s for watched, plain in pairs)

    def part_s(self, part: str) -> float:
        """Seconds of a step that go to `part`. The forward's is what all others leave of a step."""
        if part != "forward":
            return median(answer.seconds.get(part, 0.0) for answer in self.watched)
        others = [sum(answer.seconds.get(other, 0.0) for other in PARTS[1:]) for answer in self.watched]
        return median(
            plain.step_s - watched.kernels_s - rest
            for plain, watched, rest in zip(self.plain, self.watched, others, strict=True)
        )

    def kernels(self) -> list[tuple[str, float, float]]:
        """Name, seconds and calls of each kernel in a step, the longest first."""
        names = {name for answer in self.watched for name in answer.seconds if name in KERNELS}
        found = [
            (
                name,
                median(answer.seconds.get(name, 0.0) for answer in self.watched),
                median(answer.calls.get(name, 0.0) for answer in self.watched),
            )
            for name in names
        ]
        return sorted(found, key=lambda kernel: -kernel[1])

    def read_ratio(self, token_bytes: int) -> float:
        """The rate at which steps read `token_bytes`, in units of plain reads."""
        pairs = zip(self.plain, self.read_bytes_per_s, strict=True)
        return median(token_bytes / answer.step_s / read for answer, read in pairs)


def measure_steps(
    engine: Engine,
    params: SamplingParams,
    rounds: int,
    read: Callable[[], float],
    on_round: Callable[[int], None] = lambda done: None,
) -> StepTimes:
    """Generate two answers a round, after a round that warms up.

    params  how tokens are drawn, and how many
    read    reads memory, and says at how many bytes a second
    """
    times, watch = StepTimes([], [], []), Watch()
    for number in range(rounds + 1):
        plain, rate = _answer(engine, params, None), read()
        with watch.on(engine):
            watched = _answer(engine, params, watch)
        if number:
            times.plain.append(plain)
            times.watched.append(watched)
            times.read_bytes_per_s.append(rate)
        on_round(number + 1)
    return times


def token_bytes(shape: ModelShape) -> int:
    """Bytes of weights that the computation of a token reads, its Engram rows left out."""
    layers = (
        layer.dense.nbytes + layer.shared.nbytes + min(shape.top_k, layer.experts) * layer.expert.nbytes
        for layer in shape.layers
    )
    return shape.head.nbytes + sum(layers)


def _answer(engine: Engine, params: SamplingParams, watch: Watch | None) -> Answer:
    """Let one stream run to its end; what its steps took. Raises LociError where it fails."""
    begun_s, outputs = 0.0, 0
    found: list[Answer] = []
    failures: list[str] = []
    done = threading.Event()

    def on_output(output: Output) -> None:
        nonlocal begun_s, outputs
        outputs += 1
        if outputs == UNCOUNTED:
            if watch is not None:
                watch.reset()
            begun_s = time.perf_counter()
        if output.finish_reason is None:
            return
        steps = outputs - UNCOUNTED
        if output.error is not None or steps <= 0:
            failures.append(output.error or f"the answer ended after {outputs} tokens")
        elif watch is None:
            found.append(Answer((time.perf_counter() - begun_s) / steps))
        else:
            watch.switch(LOOP)
            found.append(
                Answer(
                    (time.perf_counter() - begun_s) / steps,
                    {part: seconds / steps for part, seconds in watch.seconds.items()},
                    {part: calls / steps for part, calls in watch.calls.items()},
                )
            )
        done.set()

    engine.submit(random.choices(TOKEN_IDS, k=PROMPT_TOKENS), params, on_output)
    done.wait()
    if failures:
        raise LociError(f"the model generates nothing to measure: {failures[0]}")
    return found[0]
