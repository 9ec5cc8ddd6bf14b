"""`loci bench context`: what a long context costs, by depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import DramBudget, JsonFile, KvFormatOption, OptionalModel, can_be_written
from server.cli.bench.figures import print_figures
from server.cli.plotting import need_matplotlib, picture
from server.cli.progress import progress
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from engine.bench.context import ContextRun
    from memory.hardware.this_machine import Result

BASE, QUARTER, MILLION = 1 << 13, 1 << 18, 1 << 20
DEPTHS = (BASE, 1 << 15, 1 << 17, QUARTER, 1 << 19, MILLION)
DECODE_TARGET = 1.3
PREFILL_TARGET = 0.75
MEMORY_TARGET = 1.02


def context(
    model: OptionalModel = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the sequence at which to measure, such as 8192,131072. Default: 8k, 32k, 128k, "
            "256k, 512k and 1M, as far as the model can.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to decode at each depth.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of a step.")] = 256,
    deepest_prefill: Annotated[
        int, typer.Option(min=0, help="Depth up to which prefill is measured.")
    ] = QUARTER,
    dram_budget: DramBudget = None,
    kv_format: KvFormatOption = "auto",
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Also draw decode time and prefill rate by depth (PNG; needs matplotlib).",
            callback=can_be_written,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure decode time and prefill rate by depth, bytes of KV, and memory against the plan.

    Two chunks are computed, and their rows repeated behind them, which cost as much to read and to choose
    among: a million tokens of prefill would take hours on most machines.

    Example: loci bench context ./slice --json context.json --plot context.png
    """
    from engine.bench.context import WARM_STEPS, run_context
    from engine.families.loader import open_model
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import write_results
    from memory.planner.budget import MemoryBudget

    assert model is not None
    if plot is not None:
        need_matplotlib()
    opened = open_model(model)
    form = opened.kv_format(kv_format)
    loaded = opened.load(MemoryBudget.of_this_machine(dram_budget, kv_format=form))
    try:
        most = loaded.model.info.max_context - chunk - WARM_STEPS - steps
        asked = _parsed(depths) if depths is not None else _default_depths(most)
        with progress("depths") as on_progress:
            run = run_context(
                loaded.model,
                asked,
                steps=steps,
                chunk=chunk,
                deepest_prefill=deepest_prefill,
                on_progress=lambda done: on_progress(done, len(asked)),
            )
    finally:
        loaded.model.close()
    _print_depths(run, form)
    figures = _figures(run)
    print()
    print_figures("context", figures)
    if plot is not None:
        _draw(run, plot)
        print(f"written to {plot}")
    if json_file is not None:
        write_results(json_file, detect(), [*figures, *_by_depth(run)])
        print(f"written to {json_file}")


def _parsed(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--depths {text}: expected numbers of tokens, such as 8192,131072") from None
    if not found or found[0] < 1:
        raise ConfigError(f"--depths {text}: expected numbers of tokens from 1 on")
    return found


def _default_depths(most: int) -> list[int]:
    """DEPTHS, as far as the model can: the deepest as deep as that."""
    if most < 1:
        raise ConfigError("the model's context is too short to measure; lower --chunk or --steps")
    fitting = [depth for depth in DEPTHS if depth <= most]
    beyond = next((depth for depth in DEPTHS if depth > most), None)
    return fitting if beyond is None else [*fitting, most]


def _name(tokens: int) -> str:
    """8k, 1m: how figures call a depth."""
    for size, letter in ((1 << 20, "m"), (1 << 10, "k")):
        if tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)


def _figures(run: ContextRun) -> list[Result]:
    from memory.hardware.this_machine import Result

    deepest = run.depths[-1]
    # A model that can a million tokens has no room for the next ones behind them: a little less will do.
    million = deepest.tokens if MILLION - deepest.tokens < BASE else MILLION
    found = []
    if (ratio := run.decode_ratio(million, BASE)) is not None:
        found.append(Result("context_decode_ratio_1m", ratio, "ratio", DECODE_TARGET, ratio <= DECODE_TARGET))
    if (ratio := run.prefill_ratio(QUARTER, BASE)) is not None:
        met = ratio >= PREFILL_TARGET
        found.append(Result("context_prefill_ratio_256k", ratio, "ratio", PREFILL_TARGET, met))
    found += [
        Result("context_kv_bytes_per_token", sum(run.row_bytes.values()), "B"),
        *(
            Result(f"context_kv_bytes_per_token_{device.replace(':', '_')}", nbytes, "B")
            for device, nbytes in run.row_bytes.items()
        ),
        Result("context_fixed_bytes", run.fixed_bytes / 1e6, "MB"),
    ]
    if (of_plan := run.growth_of_plan) is not None:
        is_met = of_plan <= MEMORY_TARGET
        found.append(Result("context_memory_growth_of_plan", of_plan, "ratio", MEMORY_TARGET, is_met))
    return found


def _by_depth(run: ContextRun) -> list[Result]:
    from memory.hardware.this_machine import Result

    found = []
    for depth in run.depths:
        name = _name(depth.tokens)
        found.append(Result(f"context_decode_{name}", 1e3 * depth.decode_s, "ms"))
        if depth.prefill_s:
            found.append(Result(f"context_prefill_{name}", 1 / depth.prefill_s, "tokens/s"))
        found.append(Result(f"context_memory_{name}", depth.grown_bytes / 1e6, "MB"))
        found.append(Result(f"context_planned_{name}", depth.planned_bytes / 1e6, "MB"))
    return found


def _print_depths(run: ContextRun, kv_format: str) -> None:
    first = run.depths[0]
    print_table(
        ["depth", "computed", "decode ms", "", "prefill tokens/s", "", "KV", "planned", "taken"],
        [
            (
                f"{depth.tokens:,}",
                f"{depth.computed:,}",
                f"{1e3 * depth.decode_s:.1f}",
                f"x {depth.decode_s / first.decode_s:.2f}",
                f"{1 / depth.prefill_s:.1f}" if depth.prefill_s else "",
                f"x {first.prefill_s / depth.prefill_s:.2f}" if depth.prefill_s and first.prefill_s else "",
                bytes_text(depth.kv_bytes),
                bytes_text(depth.planned_bytes),
                bytes_text(depth.grown_bytes),
            )
            for depth in run.depths
        ],
        right=(0, 1, 2, 3, 4, 5, 6, 7, 8),
    )
    print(f"KV in {kv_format}; prefill in chunks of {run.chunk}")
    print("planned: KV of that depth, and what does not grow; taken: also work space of steps")


def _draw(run: ContextRun, file: Path) -> None:
    """Decode time and prefill rate over depth."""
    measured = [d for d in run.depths if d.prefill_s]
    panels = 2 if measured else 1
    with picture(file, panels, figsize=(5 * panels, 3.6)) as (decode, *others):
        decode.plot([d.tokens for d in run.depths], [1e3 * d.decode_s for d in run.depths], "o-")
        decode.set_ylabel("decode, ms a token")
        for prefill in others:
            prefill.plot(
                [d.tokens for d in measured], [1 / d.prefill_s for d in measured if d.prefill_s], "o-"
            )
            prefill.set_ylabel("prefill, tokens/s")
        for axes in (decode, *others):
            axes.set_xscale("log", base=2)
            axes.set_xticks([d.tokens for d in run.depths], [_name(d.tokens) for d in run.depths])
            axes.set_xlabel("tokens before")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
