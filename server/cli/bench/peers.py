"""`loci bench peers`: the same model, the same prompts, over HTTP: Loci beside llama.cpp."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.arguments import JsonFile
from server.cli.bench.figures import print_figures, results_of
from server.cli.progress import progress

if TYPE_CHECKING:
    from engine.bench.streams import Timeline
    from quant.bench.timing import Figure
    from server.cli.bench.client import Target

STREAMS = 8
DECODE_TARGET, PREFILL_TARGET = 1.05, 2.0
# Threads that wait by spinning, as llama.cpp's do, come to a crawl beside a program that needs their core: a
# round in which others took more than this says nothing about either server on its own. So each waits for
# a quiet moment, but not for ever.
QUIET_CORES = 0.1
QUIET_S, MOST_WAITING_S = 0.5, 20.0


@dataclass(frozen=True)
class Race:
    """Something both servers do: answers of `tokens` tokens to `streams` prompts at once.

    ratio_name  of the figure that says how fast Loci is in units of llama.cpp
    rate        tokens per second, from what a client saw
    target      that the ratio should reach
    """

    name: str
    ratio_name: str
    streams: int
    prompt_tokens: int
    tokens: int
    rate: Callable[[Sequence[Timeline]], float]
    target: float


@dataclass
class Rates:
    """Tokens per second of both in each round, and how many cores other programs kept busy meanwhile."""

    loci: list[float] = field(default_factory=list)
    llama_cpp: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    @property
    def undisturbed(self) -> Rates:
        """Those of the quiet rounds; of all, if none was quiet."""
        rounds = [n for n, cores in enumerate(self.busy) if cores <= QUIET_CORES] or range(len(self.busy))
        loci, llama_cpp, busy = self.loci, self.llama_cpp, self.busy
        return Rates(*([values[n] for n in rounds] for values in (loci, llama_cpp, busy)))

    @property
    def ratios(self) -> list[float]:
        """How fast Loci was in units of llama.cpp, round by round."""
        return [ours / theirs for ours, theirs in zip(self.loci, self.llama_cpp, strict=True)]


def peers(
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are of quiet ones.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Threads that each server computes with.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt when decoding.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer when decoding.")] = 64,
    long_prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompts for prefill.")] = 1500,
    json_file: JsonFile = None,
) -> None:
    """Compare Loci with llama.cpp on SmolLM2-135M (Q4_1), both as servers on this machine.

    One stream, eight together, and a long prompt; both servers get the same prompts in each round, and take
    turns at being first. Each waits a while for other programs to be idle; rounds in which they were busy all
    the same do not count, unless all were like that. Needs the package xllamacpp (extra `bench`). Takes
    about five minutes on two idle cores.

    Example: loci bench peers --json peers.json
    """
    from engine.distribution import DISTRIBUTION, version_of
    from engine.embedded import model_path
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import write_results
    from quant.bench.timing import Figure, Neighbours
    from server.cli.bench.llama_cpp import check_installed, describe

    check_installed()
    model = model_path(Path("smollm2"))
    races = races_of(prompt_tokens, tokens, long_prompt)
    context = max(race.prompt_tokens + race.tokens for race in races) + 1
    with ExitStack() as stack:
        loci, llama_cpp = _servers(stack, model, threads, context)
        neighbours = Neighbours()
        with progress("rounds") as on_progress:
            found = run(races, loci, llama_cpp, rounds, on_progress)
        meanwhile = Figure("cores_busy_elsewhere", neighbours.cores(), "cores")
    print(f"Loci {version_of(DISTRIBUTION) or 'from its source'}: {_instructions()}\n{describe()}")
    print(f"{model.name}, {threads} threads each, {rounds} rounds; medians, also of the rounds' ratios\n")
    figures = [*_figures(races, found), meanwhile]
    print_figures("Loci beside llama.cpp", figures)
    print()
    for race in races:
        quiet = found[race.name].undisturbed
        text = f"{race.ratio_name}: {min(quiet.ratios):.2f} to {max(quiet.ratios):.2f} in single rounds"
        if max(quiet.busy) > QUIET_CORES:
            text += f"; all were disturbed, by programs that kept {median(quiet.busy):.1f} cores busy"
        elif len(quiet.busy) < rounds:
            text += f", of which {rounds - len(quiet.busy)} disturbed ones are left out"
        print(text)
    if json_file is not None:
        write_results(json_file, detect(), results_of(figures))
        print(f"written to {json_file}")


def _instructions() -> str:
    """What Loci's kernels are compiled for here."""
    from quant.kernels.choice import choose
    from quant.kernels.cpu.native import NativeKernels

    kernels = choose()
    if isinstance(kernels, NativeKernels):
        return f"{kernels.level}, {kernels.activations} activations"
    return kernels.describe()


def races_of(prompt_tokens: int, tokens: int, long_prompt: int) -> list[Race]:
    """What is run: decoding one stream, and several together, and the prefill of one long prompt."""
    from engine.bench.streams import decode_rate

    def prefill_rate(timelines: Sequence[Timeline]) -> float:
        return long_prompt / timelines[0].ttft_s

    return [
        *(
            Race(
                f"decode_{streams}",
                f"llama_cpp_decode_ratio_{streams}",
                streams,
                prompt_tokens,
                tokens,
                decode_rate,
                DECODE_TARGET,
            )
            for streams in (1, STREAMS)
        ),
        Race("prefill", "llama_cpp_prefill_ratio", 1, long_prompt, 1, prefill_rate, PREFILL_TARGET),
    ]


def _servers(stack: ExitStack, model: Path, threads: int, context: int) -> tuple[Target, Target]:
    """Loci's server and llama.cpp's, each in a process of its own."""
    from server.cli.bench.client import Target
    from server.cli.bench.llama_cpp import serving_llama_cpp
    from server.cli.child import serving

    flags = f"--max-num-seqs={STREAMS}", f"--max-model-len={context}", "--served-model-name=smollm2"
    variables = {"OMP_NUM_THREADS": str(threads)}
    loci = stack.enter_context(serving(str(model), *flags, variables=variables))
    llama_cpp = stack.enter_context(serving_llama_cpp(model, threads, STREAMS, context))
    return Target(loci, "smollm2"), Target(llama_cpp, "smollm2")


def run(
    races: Sequence[Race],
    loci: Target,
    llama_cpp: Target,
    rounds: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Rates]:
    """Let both run each race once a round, after a round that warms up and does not count.

    Each waits until no other program is busy, MOST_WAITING_S at most.
    """
    from quant.bench.timing import Neighbours
    from server.cli.bench.comparison import Load, run_http

    found = {race.name: Rates() for race in races}
    done, total = itertools.count(1), (rounds + 1) * len(races)
    for number in range(rounds + 1):
        for race in races:
            prompts = Load(race.prompt_tokens, race.tokens, 1).prompts(race.streams)
            _await_quiet()
            rates, neighbours = found[race.name], Neighbours()
            sides = (loci, rates.loci), (llama_cpp, rates.llama_cpp)
            # Who begins changes, so that what disturbs the machine for a while disturbs both.
            for target, noted in sides[:: 1 if number % 2 else -1]:
                rate = race.rate(run_http(target, prompts, race.tokens))
                if number:
                    noted.append(rate)
            if number:
                rates.busy.append(neighbours.cores())
            on_progress(next(done), total)
    return found


def _await_quiet() -> None:
    from quant.bench.timing import Neighbours

    deadline = time.monotonic() + MOST_WAITING_S
    while time.monotonic() < deadline:
        neighbours = Neighbours()
        time.sleep(QUIET_S)
        if neighbours.cores() <= QUIET_CORES:
            return


def _figures(races: Sequence[Race], found: dict[str, Rates]) -> list[Figure]:
    from quant.bench.timing import Figure

    figures = []
    for race in races:
        rates = found[race.name].undisturbed
        figures += [
            Figure(f"loci_{race.name}", median(rates.loci), "tokens/s"),
            Figure(f"llama_cpp_{race.name}", median(rates.llama_cpp), "tokens/s"),
            Figure(race.ratio_name, median(rates.ratios), "ratio", race.target),
        ]
    return figures
