"""`loci bench peers`: the same model, the same prompts, over HTTP: Loci beside llama.cpp."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import JsonFile
from server.cli.bench.figures import print_figures, results_of
from server.cli.progress import progress, transfer

if TYPE_CHECKING:
    from engine.bench.streams import Timeline
    from quant.bench.timing import Figure
    from server.cli.bench.client import Target

STREAMS = 8
DECODE_TARGET, PREFILL_TARGET, MIXTURE_TARGET = 1.05, 2.0, 1.0
SMOLLM2 = "smollm2"
# Mixtures with random weights, by what their figures are called: the shape, and so few layers that its file
# is written in seconds.
MIXTURES = {"gguf_moe": ("qwen3-30b-a3b", 4), "gguf_gpt_oss": ("gpt-oss-20b", 4)}
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
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="smollm2, gguf_moe, gguf_gpt_oss; may be repeated. Default: all."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are of quiet ones.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Threads that each server computes with.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt when decoding.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer when decoding.")] = 64,
    long_prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompts for prefill.")] = 1500,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Where mixtures' files are written, and removed again. Default: TMPDIR."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare Loci with llama.cpp, both as servers on this machine, on the same GGUF files.

    SmolLM2-135M (Q4_1): one stream, eight together, and a long prompt. Mixtures of experts with random
    weights, as `loci synth` makes them, four layers of Qwen3-30B-A3B (Q4_K_M) and of gpt-oss-20b (MXFP4): one
    stream and a long prompt; they take up to 2 GB on disk and 5 GB in memory.

    Both servers get the same prompts in each round, and take turns at being first. Each waits a while for
    other programs to be idle; rounds in which they were busy all the same do not count, unless all were like
    that. Needs the package xllamacpp (extra `bench`). Takes about a quarter of an hour on two idle cores.

    Example: loci bench peers --json peers.json
    """
    from engine.distribution import DISTRIBUTION, version_of
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import write_results
    from quant.bench.timing import Figure, Neighbours
    from server.cli.bench.llama_cpp import check_installed, describe

    check_installed()
    known = (SMOLLM2, *MIXTURES)
    if unknown := [name for name in models or () if name not in known]:
        raise ConfigError(f"{unknown[0]}: no model to compare on; known: {', '.join(known)}")
    races: list[Race] = []
    found: dict[str, Rates] = {}
    neighbours = Neighbours()
    for name in dict.fromkeys(models or known):
        of_model = races_of(name, prompt_tokens, tokens, long_prompt)
        context = max(race.prompt_tokens + race.tokens for race in of_model) + 1
        streams = max(race.streams for race in of_model)
        with ExitStack() as stack:
            loci, llama_cpp = _servers(stack, _model(stack, name, scratch), threads, streams, context)
            with progress(f"{name}, rounds") as on_progress:
                found |= run(of_model, loci, llama_cpp, rounds, on_progress)
        races += of_model
    meanwhile = Figure("cores_busy_elsewhere", neighbours.cores(), "cores")
    print(f"Loci {version_of(DISTRIBUTION) or 'from its source'}: {_instructions()}\n{describe()}")
    print(f"{threads} threads each, {rounds} rounds; medians, also of the rounds' ratios\n")
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


def races_of(name: str, prompt_tokens: int, tokens: int, long_prompt: int) -> list[Race]:
    """What is run on a model: decoding one stream, of SmolLM2 also several together, and a long prompt."""
    from engine.bench.streams import decode_rate

    def prefill_rate(timelines: Sequence[Timeline]) -> float:
        return long_prompt / timelines[0].ttft_s

    if name != SMOLLM2:
        decode, prefill = f"{name}_decode", f"{name}_prefill"
        return [
            Race(decode, f"{decode}_ratio", 1, prompt_tokens, tokens, decode_rate, MIXTURE_TARGET),
            Race(prefill, f"{prefill}_ratio", 1, long_prompt, 1, prefill_rate, MIXTURE_TARGET),
        ]
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


def _model(stack: ExitStack, name: str, scratch: Path | None) -> Path:
    """A model's file: the one that comes with Loci, or one that is written now and removed with the stack.

    Raises ConfigError or BudgetError where it cannot be written.
    """
    from engine.embedded import model_path
    from engine.synthetic_gguf import plan_gguf
    from memory.checkpoint.random_gguf import write_gguf

    if name == SMOLLM2:
        return model_path(Path(SMOLLM2))
    if scratch is not None and not scratch.is_dir():
        raise ConfigError(f"{scratch}: no such directory to write to")
    folder = stack.enter_context(TemporaryDirectory(prefix="loci-peers-", dir=scratch))
    file = Path(folder) / f"{name}.gguf"
    with transfer(f"{name}, writing") as on_progress:
        write_gguf(plan_gguf(*MIXTURES[name]), file, on_progress)
    return file


def _servers(
    stack: ExitStack, model: Path, threads: int, streams: int, context: int
) -> tuple[Target, Target]:
    """Loci's server and llama.cpp's, each in a process of its own."""
    from server.cli.bench.client import Target
    from server.cli.bench.llama_cpp import serving_llama_cpp
    from server.cli.child import serving

    name = model.stem
    flags = f"--max-num-seqs={streams}", f"--max-model-len={context}", f"--served-model-name={name}"
    variables = {"OMP_NUM_THREADS": str(threads)}
    loci = stack.enter_context(serving(str(model), *flags, variables=variables))
    llama_cpp = stack.enter_context(serving_llama_cpp(model, threads, streams, context))
    return Target(loci, name), Target(llama_cpp, name)


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
