"""`loci bench engram`: what n-gram tables in DRAM and on disk cost, beside none at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.arguments import JsonFile, Model
from server.cli.progress import progress
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from engine.bench.engram import EngramRun

# Parts by which steps may be slower than without the table.
TARGETS = {"dram": 0.01, "nvme": 0.03}
PERCENTILES = (50, 90, 99)


def engram(
    model: Model,
    rounds: Annotated[int, typer.Option(min=2, max=1000, help="Number of rounds; each runs every case.")] = 9,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens to decode in each.")] = 12,
    prompt: Annotated[int, typer.Option(min=1, max=4096, help="Prompt tokens in each.")] = 128,
    warm: Annotated[
        int, typer.Option(min=0, help="Tokens whose rows are looked up beforehand to fill the hot cache.")
    ] = 200_000,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Trace of row lookups from real text, used instead of random rows.", show_default=False
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="GPUs to compute layers on, e.g. cuda:24GiB. Default: none."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Decode and prefill with the Engram tables absent, in DRAM, and on disk with a tenth of them in DRAM.

    The whole model must fit in memory. The slice in the example takes a few minutes.

    Example: loci synth deepseek-v4.1-flash --layers 3 --experts 16 --engram-rows 20000000 --out ./slice

    and then: loci bench engram ./slice

    Rows of real text: loci bench engram deploy/demo/loci-demo --trace deploy/demo/traces/engram.safetensors
    """
    from engine.bench.engram import KINDS, EngramCase, run_engram
    from engine.bench.streams import percentile
    from memory.engram.traces import load_rows
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import Result, write_results
    from memory.planner.budget import unused_gpus_notice

    if notice := unused_gpus_notice(devices):
        print(f"loci: {notice}", file=sys.stderr)
    with progress("rounds") as on_progress:
        run = run_engram(
            model,
            EngramCase(rounds, tokens, prompt, warm),
            trace=None if trace is None else load_rows(trace),
            devices=devices,
            on_progress=on_progress,
        )
    _print(run)
    if json_file is not None:
        results = []
        for where, target in TARGETS.items():
            worst = run.worst_penalty(where)
            results.append(Result(f"engram_{where}_penalty", worst, "fraction", target, worst <= target))
        for where, skew in run.hits:
            for kind in KINDS:
                name = f"engram_{where}_{skew}_{kind}_penalty"
                results.append(Result(name, run.penalty(where, skew, kind), "fraction"))
                results.append(Result(f"{name}_error", run.doubt(where, skew, kind), "fraction"))
            results.append(Result(f"engram_{where}_{skew}_hits", run.hits[where, skew], "ratio"))
            for percent in PERCENTILES:
                value = 1e6 * percentile(run.lookups[where, skew], percent)
                results.append(Result(f"engram_{where}_{skew}_lookup_p{percent}", value, "us"))
        write_results(json_file, detect(model), results)
        print(f"written to {json_file}")


def _print(run: EngramRun) -> None:
    from engine.bench.engram import KINDS
    from engine.bench.streams import percentile

    print(
        f"tables of {bytes_text(run.table_bytes)}, {run.rows_a_token} rows per token; on disk with "
        f"{bytes_text(run.hot_bytes)} in DRAM"
    )
    rows = []
    for where, skew in run.decode:
        seconds = [f"{1e3 * percentile(times[where, skew], 50):.2f}" for times in (run.decode, run.prefill)]
        if where not in TARGETS:
            rows.append((where, skew, *seconds, *[""] * 6))
            continue
        penalties = [
            f"{run.penalty(where, skew, kind):+.2%} ±{run.doubt(where, skew, kind):.2%}" for kind in KINDS
        ]
        latencies = [f"{1e6 * percentile(run.lookups[where, skew], percent):.0f}" for percent in PERCENTILES]
        rows.append((where, skew, *seconds, *penalties, f"{run.hits[where, skew]:.1%}", *latencies))
    headers = ["table", "rows", "decode ms", "prefill ms", "decode", "prefill", "in DRAM"]
    print_table([*headers, *(f"lookup p{p} us" for p in PERCENTILES)], rows, right=tuple(range(2, 10)))
    for where, target in TARGETS.items():
        worst = run.worst_penalty(where)
        verdict = "met" if worst <= target else "missed"
        print(f"engram_{where}_penalty {worst:+.2%}, target {target:.0%}: {verdict}")
