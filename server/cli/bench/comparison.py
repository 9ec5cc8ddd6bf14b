"""What `loci bench serve` runs: the same streams over HTTP and on the bare engine, in turns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from engine.bench.streams import TOKEN_IDS, StepCost, Timeline, percentile, run_engine, throughput
from engine.engine import Engine
from engine.sampling.params import SamplingParams
from quant.errors import LociError
from server.cli.bench.client import CompletionStream, Target, stream_completion, stream_completions

# Tokens of the running streams' prompts, and pieces that each has sent before a long prompt comes.
BEFORE_TOKENS = 16


@dataclass(frozen=True)
class Load:
    """What to run: tokens of each prompt and answer, and how often."""

    prompt_tokens: int
    tokens: int
    rounds: int

    @property
    def all_rounds(self) -> int:
        """Those that count, and one to warm up."""
        return self.rounds + 1

    def prompts(self, count: int) -> list[list[int]]:
        """Prompts of random tokens, none of which any cache has seen."""
        return [random.choices(TOKEN_IDS, k=self.prompt_tokens) for _ in range(count)]


@dataclass
class Comparison:
    """Streams of one concurrency: over HTTP, and on the bare engine where there was one."""

    http: list[list[Timeline]] = field(default_factory=list)
    bare: list[list[Timeline]] = field(default_factory=list)
    costs: list[StepCost] = field(default_factory=list)

    @property
    def http_throughput(self) -> float:
        """Output tokens per second over HTTP, median of the rounds."""
        return median(throughput(run) for run in self.http)

    @property
    def ratio(self) -> float:
        """HTTP's share of the bare engine's throughput: the median of what each round found."""
        return median(
            throughput(http) / throughput(bare) for http, bare in zip(self.http, self.bare, strict=True)
        )

    @property
    def overhead_us(self) -> float:
        """Microseconds of a bare step on top of the model's forward pass, median of the rounds."""
        return median(cost.overhead_us for cost in self.costs)


def compare(
    target: Target,
    engine: Engine | None,
    streams: int,
    load: Load,
    on_round: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run `streams` streams together `load.rounds` times, over HTTP and on the engine.

    Who begins changes from round to round, so that what disturbs the machine for a while disturbs both.
    """
    found = Comparison()

    def over_http() -> None:
        found.http.append(run_http(target, load.prompts(streams), load.tokens))

    def on_the_engine() -> None:
        if engine is not None:
            params = SamplingParams(max_tokens=load.tokens, temperature=0.0, ignore_eos=True)
            bare, cost = run_engine(engine, load.prompts(streams), params)
            found.bare.append(bare)
            found.costs.append(cost)

    for number in range(load.all_rounds):
        for run in (over_http, on_the_engine)[:: 1 if number % 2 else -1]:
            run()
        on_round()
    # The first round warms up.
    return Comparison(found.http[1:], found.bare[1:], found.costs[1:])


def run_http(target: Target, prompts: Sequence[list[int]], tokens: int) -> list[Timeline]:
    """Ask for an answer of so many tokens to each prompt at once, and wait for all."""
    return asyncio.run(stream_completions(target, [_fields(prompt, tokens) for prompt in prompts]))


@dataclass(frozen=True)
class Interference:
    """Inter-token latencies (seconds) of running streams before and while a long prompt is computed."""

    prompt_tokens: int
    ttft_s: float
    before_s: list[float]
    during_s: list[float]

    @property
    def p99_ratio(self) -> float:
        """How many times as long the longest gaps are while the prompt is computed."""
        return percentile(self.during_s, 99) / percentile(self.before_s, 99)


def interfere(target: Target, streams: int, prompt_tokens: int, answer_tokens: int) -> Interference:
    """Let `streams` streams run, send a prompt of `prompt_tokens`, and look at the streams' gaps."""
    return asyncio.run(_interfere(target, streams, prompt_tokens, answer_tokens))


async def _interfere(target: Target, streams: int, prompt_tokens: int, answer_tokens: int) -> Interference:
    short = Load(BEFORE_TOKENS, answer_tokens, 1)
    running = [CompletionStream() for _ in range(streams)]
    tasks = [
        asyncio.ensure_future(stream_completion(target, _fields(prompt, answer_tokens), stream))
        for prompt, stream in zip(short.prompts(streams), running, strict=True)
    ]
    while min(len(s.timeline.arrivals_s) for s in running) <= BEFORE_TOKENS and not all(
        task.done() for task in tasks
    ):
        await asyncio.sleep(0.01)
    long = await stream_completion(target, _fields(Load(prompt_tokens, 1, 1).prompts(1)[0], 1))
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
    before: list[float] = []
    during: list[float] = []
    for timeline in (stream.timeline for stream in running):
        for gap, ended in zip(timeline.itl_s, timeline.arrivals_s[1:], strict=True):
            if ended < long.sent_s:
                before.append(gap)
            elif ended - gap < long.arrivals_s[-1]:
                during.append(gap)
    if not before or not during:
        raise LociError(
            f"a prompt of {prompt_tokens} tokens did not overlap with the running streams; use a longer one"
        )
    return Interference(prompt_tokens, long.ttft_s, before, during)


def _fields(prompt: list[int], tokens: int) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
