"""`loci synth`: a slice of a large model with random weights, to try a machine with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError
from server.cli.terminal import bytes_text, can_draw

if TYPE_CHECKING:
    from memory.checkpoint.random_files import RandomCheckpoint
    from memory.checkpoint.random_gguf import RandomGguf

LINE_STEP = 10  # without a terminal: a line whenever another so many hundredths are done


def synth(
    shape: Annotated[
        str,
        typer.Argument(
            help="deepseek-v4.1-flash; as GGUF qwen3-30b-a3b, qwen3-235b-a22b, gpt-oss-20b, gpt-oss-120b; "
            "v41-tiny, v41-narrow, qwen3-moe-tiny, gpt-oss-tiny for tests.",
            show_default=False,
        ),
    ],
    layers: Annotated[int, typer.Option(help="Number of layers; of V4.1 3 to 40.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New directory, or GGUF file, to write.", show_default=False)],
    engram_rows: Annotated[
        int | None, typer.Option(help="V4.1: approximate rows of each Engram table.", show_default=False)
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            min=1, help="V4.1: routed experts per layer. Default: as in the model.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the random weights.")] = 0,
) -> None:
    """Write a checkpoint with a large model's real dimensions and formats, few layers and random weights.

    Such a slice loads, serves and moves bytes as the full model would; its output is meaningless. Qwen3-MoE
    and gpt-oss become GGUF files, in the types of Q4_K_M and of MXFP4 with eight bits for the rest.

    Example: loci synth deepseek-v4.1-flash --layers 4 --engram-rows 60000000 --out ./slice
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from memory.checkpoint.random_files import write_checkpoint
    from memory.checkpoint.random_gguf import RandomGguf, write_gguf

    plan = _plan(shape, layers, engram_rows, experts)
    watched = can_draw()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    next_line = LINE_STEP
    start = time.perf_counter()
    with Progress(TextColumn("writing"), *columns, disable=not watched) as bar:
        task = bar.add_task("writing", total=None)

        def on_progress(done: int, total: int) -> None:
            nonlocal next_line
            bar.update(task, completed=done, total=total)
            share = 100 * done // total
            if not watched and share >= next_line:
                next_line = share // LINE_STEP * LINE_STEP + LINE_STEP
                print(f"{share:3d} %  {bytes_text(done)} of {bytes_text(total)}", flush=True)

        if isinstance(plan, RandomGguf):
            write_gguf(plan, out, on_progress, seed=seed)
        else:
            write_checkpoint(plan, out, on_progress, seed=seed)
    seconds = time.perf_counter() - start
    use = "bench step" if isinstance(plan, RandomGguf) else "bench slice"
    speed = bytes_text(int(plan.nbytes / seconds))
    print(f"{out}: {bytes_text(plan.nbytes)} in {seconds:.0f} s ({speed}/s); try `loci {use} {out}`")


def _plan(
    shape: str, layers: int, engram_rows: int | None, experts: int | None
) -> RandomCheckpoint | RandomGguf:
    from engine.synthetic import SHAPES, plan_slice
    from engine.synthetic_gguf import SHAPES as GGUF_SHAPES
    from engine.synthetic_gguf import plan_gguf

    if shape in GGUF_SHAPES:
        if engram_rows is not None or experts is not None:
            raise ConfigError(f"{shape}: --engram-rows and --experts are for DeepSeek-V4.1; leave them out")
        return plan_gguf(shape, layers)
    if shape not in SHAPES:
        raise ConfigError(f"{shape}: unknown shape; known: {', '.join((*SHAPES, *GGUF_SHAPES))}")
    if engram_rows is None:
        raise ConfigError(f"{shape}: --engram-rows says how large its tables are to be")
    return plan_slice(shape, layers, engram_rows, experts)
