"""A decode step of one stream: the time inside the compiled kernels, and what the rest of it goes to.

Watching takes time of its own. So a few steps are watched, the next ones not, and so on: how long a step is
comes from those that nobody watches, and what disturbs the machine for a while disturbs both.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
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
# Steps that are watched, or not, in a row; the first is spoilt by the change.
BLOCK = 16
PAIR = 2 * BLOCK
# What the host does in a step, as reports list it; the forward's part is what it does outside kernels.
PARTS = (
    "forward", "waiting", "policy", "scheduling", "assembling", "sampling", "masks", "log probabilities",
    "drafting", "prefetching", "detokenising", "output", LOOP,
)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """What some steps in a row took on average.

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
    """Pairs of steps that nobody watched and the next ones, which were watched, and a plain read before them.

    read_bytes_per_s  of the plain read, for each pair
    """

    plain: list[Steps] = field(default_factory=list)
    watched: list[Steps] = field(default_factory=list)
    read_bytes_per_s: list[float] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Duration of a step, not watched."""
        return median(steps.step_s for steps in self.plain)

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
        """Seconds of a watched step that go to `part`."""
        return median(steps.seconds.get(part, 0.0) for steps in self.watched)

    def kernels(self) -> list[tuple[str, float, float]]:
        """Name, seconds and calls of each kernel in a step, the longest first."""
        names = {name for steps in self.watched for name in steps.seconds if name in KERNELS}
        found = [
            (
                name,
                median(steps.seconds.get(name, 0.0) for steps in self.watched),
                median(steps.calls.get(name, 0.0) for steps in self.watched),
            )
            for name in names
        ]
        return sorted(found, key=lambda kernel: -kernel[1])

    def read_ratio(self, token_bytes: int) -> float:
        """The rate at which steps read `token_bytes`, in units of plain reads."""
        pairs = zip(self.plain, self.read_bytes_per_s, strict=True)
        return median(token_bytes / steps.step_s / read for steps, read in pairs)


def answer_tokens(steps: int) -> int:
    """Tokens of an answer in which at least so many steps are measured, in whole pairs."""
    return UNCOUNTED + -(-steps // PAIR) * PAIR


def measure_steps(
    engine: Engine,
    params: SamplingParams,
    rounds: int,
    read: Callable[[], float],
    on_round: Callable[[int], None] = lambda done: None,
) -> StepTimes:
    """Generate an answer a round, after one that warms up. Raises LociError where it fails.

    params  how tokens are drawn; max_tokens are `answer_tokens`
    read    reads memory, and says at how many bytes a second
    """
    times = StepTimes()
    for number in range(rounds + 1):
        rate = read()
        stream = _Stream(engine)
        engine.submit(random.choices(TOKEN_IDS, k=PROMPT_TOKENS), params, stream.on_output)
        stream.done.wait()
        if stream.failure is not None:
            raise LociError(f"the model generates nothing to measure: {stream.failure}")
        if number:
            times.plain.extend(stream.plain)
            times.watched.extend(stream.watched)
            times.read_bytes_per_s.extend([rate] * len(stream.plain))
        on_round(number + 1)
    return times


def token_bytes(shape: ModelShape) -> int:
    """Bytes of weights that the computation of a token reads, its Engram rows left out."""
    layers = (
        layer.dense.nbytes + layer.shared.nbytes + min(shape.top_k, layer.experts) * layer.expert.nbytes
        for layer in shape.layers
    )
    return shape.head.nbytes + sum(layers)


class _Stream:
    """An answer whose steps are watched block by block, from the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self.plain: list[Steps] = []
        self.watched: list[Steps] = []
        self.failure: str | None = None
        self.done = threading.Event()
        self._engine = engine
        self._watch = Watch()
        self._watching = ExitStack()
        self._outputs = 0
        self._begun_s = 0.0

    def on_output(self, output: Output) -> None:
        """Note the time; begin and end blocks."""
        self._outputs += 1
        block, step = divmod(self._outputs - UNCOUNTED, BLOCK)
        if block > 0 and step == 0:
            self._end_block()
        if output.finish_reason is not None:
            self._watching.close()
            if output.error is not None or not self.watched:
                self.failure = output.error or f"the answer ended after {self._outputs} tokens"
            self.done.set()
        elif step == 0 and block % 2:
            self._watching.enter_context(self._watch.on(self._engine))
        elif step == 1:
            self._watch.reset()
            self._begun_s = time.perf_counter()

    def _end_block(self) -> None:
        steps = BLOCK - 1
        step_s = (time.perf_counter() - self._begun_s) / steps
        if len(self.plain) == len(self.watched):
            self.plain.append(Steps(step_s))
            return
        self._watch.switch(LOOP)
        self._watching.close()
        seconds, calls = self._watch.seconds, self._watch.calls
        by_step = ({name: total / steps for name, total in totals.items()} for totals in (seconds, calls))
        self.watched.append(Steps(step_s, *by_step))
