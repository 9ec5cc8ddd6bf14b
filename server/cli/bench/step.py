"""`loci bench step`: what a decode step's time goes to, and how near it comes to reading its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import JsonFile, OptionalNamedModel
from server.cli.bench.figures import print_figures, results_of
from server.cli.progress import progress
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from engine.bench.step import StepTimes
    from engine.families.base import Model
    from quant.bench.timing import Figure

KERNEL_TARGET = 0.80  # for the demonstration model
READ_TARGET = 0.90  # for models whose tokens read more than caches hold
BEYOND_CACHES = 512 << 20
SHOWN_KERNELS = 6
ENDLESS = r"/(.|\n)*the very end of all text/"  # a grammar of texts that no model ends
NAMES = {
    "forward": "forward, outside kernels",
    "waiting": "waiting for Engram rows",
    "assembling": "assembling the batch",
    "policy": "the policy's books",
    "prefetching": "Engram addresses, requests",
    "loop": "step loop, locks",
}


def step(
    model: OptionalNamedModel = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Steps in each answer, rounded up to a multiple of 32.")
    ] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 9,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="As in requests.")] = 1.0,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, help="Log probabilities of so many best tokens, too.")
    ] = None,
    masked: Annotated[
        bool, typer.Option("--masked", help="Under a grammar, which masks tokens in each step.")
    ] = False,
    dram_budget: Annotated[
        str | None,
        typer.Option(help="Memory for weights, e.g. 4GiB. Default: three quarters of free memory."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show what a step of one stream takes: kernels, and everything that the host does around them.

    Watching costs time, so it is on for a few steps and off for the next ones, which say how long a step is.
    If the whole model is in memory, the rate at which it reads its weights is compared with plain reads in
    the same round.

    Example: loci bench step demo --json step.json
    """
    from engine.bench.step import PROMPT_TOKENS, answer_tokens, measure_steps, token_bytes
    from engine.embedded import embedded_name, model_path
    from engine.families.loader import open_checkpoint
    from engine.families.shapes import shape_of
    from engine.grammar.lark import GrammarWriter
    from engine.sampling.params import SamplingParams
    from memory.hardware.detect import detect
    from memory.hardware.measure import working_bytes
    from memory.hardware.this_machine import write_results
    from quant.bench.arena import Arena
    from quant.bench.timing import Figure, Neighbours, host_seconds
    from quant.kernels.choice import choose
    from quant.kernels.cpu.native import NativeKernels
    from server.serving.service import bring_up, prepare
    from server.settings import resolve_settings

    path = model_path(model)
    kernels = choose()
    if not isinstance(kernels, NativeKernels):
        raise ConfigError(f"nothing to measure: {kernels.describe()}")
    length = answer_tokens(tokens)
    params = SamplingParams(
        max_tokens=length,
        temperature=temperature,
        top_p=top_p,
        logprobs=logprobs,
        ignore_eos=not masked,
        grammar=GrammarWriter({}).finished(ENDLESS) if masked else None,
    )
    served = bring_up(
        prepare(
            resolve_settings(
                {
                    "model": str(path),
                    "dram_budget": dram_budget,
                    "max_num_seqs": 1,
                    "max_model_len": PROMPT_TOKENS + length,
                    "prefix_cache": "0",
                }
            )
        )
    )
    try:
        arena, neighbours = Arena(working_bytes(), kernels), Neighbours()
        nbytes = len(arena.bytes)
        with progress("rounds") as on_progress:
            times = measure_steps(
                served.engine_here,
                params,
                rounds,
                lambda: nbytes / host_seconds(lambda: arena.read(0, nbytes)),
                lambda done: on_progress(done, rounds + 1),
            )
        meanwhile = Figure("cores_busy_elsewhere", neighbours.cores(), "cores")
        is_resident = _is_resident(served.loaded.model)
    finally:
        served.engine.stop()
        served.loaded.model.close()
    print(f"{served.name}: {kernels.describe()}\n")
    _print_parts(times)
    figures = _figures(times, KERNEL_TARGET if embedded_name(path) == "demo" else None)
    if is_resident:
        read = token_bytes(shape_of(open_checkpoint(path)))
        figures += _read_figures(times, read)
        print(f"\na token reads {bytes_text(read)} of weights, all of them in memory")
    print()
    print_figures("a decode step", [*figures, meanwhile])
    if json_file is not None:
        write_results(json_file, detect(), results_of([*figures, *_parts(times), meanwhile]))
        print(f"written to {json_file}")


def _is_resident(model: Model) -> bool:
    """Whether all experts are in DRAM."""
    return all(tier == "dram" for layer in model.expert_tiers() for tier in layer)


def _print_parts(times: StepTimes) -> None:
    from engine.bench.step import PARTS

    kernels = times.kernels()
    rows = [("kernels", times.kernel_share * times.step_s), *((part, times.part_s(part)) for part in PARTS)]
    print_table(
        ["part of a step", "us", "share"],
        [
            *(
                (NAMES.get(part, part), f"{1e6 * s:.0f}", f"{s / times.step_s:.1%}")
                for part, s in rows
                if s != 0
            ),
            ("step", f"{1e6 * times.step_s:.0f}", ""),
        ],
        right=(1, 2),
    )
    print(f"\nthe parts contain {1e6 * times.watching_s:.0f} us of watching, by which a step was longer\n")
    print_table(
        ["kernel", "us", "calls"],
        [(name, f"{1e6 * s:.0f}", f"{calls:.1f}") for name, s, calls in kernels[:SHOWN_KERNELS]],
        right=(1, 2),
    )


def _figures(times: StepTimes, target: float | None) -> list[Figure]:
    from quant.bench.timing import Figure

    return [
        Figure("step_ms", 1e3 * times.step_s, "ms"),
        Figure("step_kernel_share", times.kernel_share, "ratio", target),
    ]


def _read_figures(times: StepTimes, nbytes: int) -> list[Figure]:
    from statistics import median

    from quant.bench.timing import Figure

    target = READ_TARGET if nbytes >= BEYOND_CACHES else None
    return [
        Figure("plain_read", median(times.read_bytes_per_s) / 1e9, "GB/s"),
        Figure("resident_step_read", nbytes / times.step_s / 1e9, "GB/s"),
        Figure("resident_step_read_ratio", times.read_ratio(nbytes), "ratio", target),
    ]


def _parts(times: StepTimes) -> list[Figure]:
    from engine.bench.step import PARTS
    from quant.bench.timing import Figure

    return [
        *(Figure(f"step_{part.replace(' ', '_')}_us", 1e6 * times.part_s(part), "us") for part in PARTS),
        Figure("step_kernel_calls", sum(calls for _, _, calls in times.kernels()), "calls"),
        Figure("step_watching_us", 1e6 * times.watching_s, "us"),
    ]
