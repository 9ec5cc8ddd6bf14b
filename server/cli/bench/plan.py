"""`loci bench plan`: what the plan said of a model within budgets, beside what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.arguments import JsonFile, Model
from server.cli.progress import progress
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from engine.bench.plan_error import Compared

TARGET = 0.15
RATES = ("dram_read", "cpu_experts", "cpu_matmul", "disk_read")


def plan_(
    model: Model,
    dram_budgets: Annotated[
        str | None,
        typer.Option(help="Memory for weights, e.g. 4GiB,8GiB. Default: for 30, 60, 100 % of the experts."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs, e.g. virtual:1GiB@12.5GB/s. Default: none.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, max=100_000, help="Tokens to decode.")] = 48,
    prompt: Annotated[int, typer.Option(min=64, max=1_000_000, help="Tokens of the prompt.")] = 4096,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt tokens per step. Default: as planned.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Decode, and compute a prompt, within several budgets, and compare each with its plan.

    The machine's rates are measured in pauses of the same runs. Every expert is taken to be equally likely
    as with random weights.

    Example: loci bench plan ./slice --dram-budgets 4GiB,6GiB,8GiB
    """
    from engine.bench.plan_error import budgets, compare_decode, compare_prompt
    from engine.bench.slice import steps
    from engine.families.loader import open_checkpoint
    from engine.families.shapes import loaded_shape_of
    from memory.hardware.detect import detect
    from memory.hardware.profiles import parse_bytes
    from memory.hardware.this_machine import Result, write_results
    from memory.planner.budget import MemoryBudget
    from server.cli.bench.figures import print_figures

    machine = detect(model)
    shape = loaded_shape_of(open_checkpoint(model))
    limits = MemoryBudget.of_this_machine(devices=devices)
    sizes = (
        budgets(shape, limits.dram_bytes)
        if dram_budgets is None
        else [parse_bytes(text) for text in dram_budgets.split(",")]
    )
    found: list[Compared] = []
    total = steps(tokens)
    for size in sizes:
        budget = replace(limits, dram_bytes=size)
        with progress(f"tokens with {bytes_text(size)}") as on_progress:

            def done(count: int, on_progress: Callable[[int, int], None] = on_progress) -> None:
                on_progress(count, total)

            found.append(compare_decode(model, shape, machine, budget, tokens, done))
        found.append(compare_prompt(model, shape, machine, budget, prompt, chunk))
    rows = [_row(one) for one in found]
    head = ["DRAM", "", "tok/s", "plan", "off", "the plan's bound", "MB read", "plan", "missed", "rates"]
    print_table(head, rows, right=(0, 2, 3, 4, 6, 7, 8))
    print("MB read: from disk, for each token; missed: uses of experts that waited for that")
    print("rates: GB/s of plain reads, GB/s of experts, GFLOP/s of products, GB/s of the disk")
    figures = []
    for what in ("decode", "prompt"):
        worst = max(abs(one.error) for one in found if one.what == what)
        figures.append(Result(f"plan_error_{what}", worst, "fraction", TARGET, worst <= TARGET))
    print_figures("the plan", figures)
    if json_file is not None:
        each = [
            Result(f"plan_error_{one.what}_{one.dram_bytes}", abs(one.error), "fraction") for one in found
        ]
        write_results(json_file, machine, [*figures, *each])
        print(f"written to {json_file}")


def _row(one: Compared) -> tuple[str, ...]:
    return (
        bytes_text(one.dram_bytes),
        one.what,
        f"{one.measured_tokens_per_s:.3g}",
        f"{one.planned.tokens_per_s:.3g}",
        f"{one.error:+.0%}",
        one.planned.bound,
        f"{one.read_bytes / 1e6:.3g}",
        f"{one.planned_read_bytes / 1e6:.3g}",
        f"{one.hits.get('nvme', 0.0):.0%}",
        ", ".join(f"{one.rates[name]:.3g}" for name in RATES if name in one.rates),
    )
