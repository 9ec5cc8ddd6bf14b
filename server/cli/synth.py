"""`loci synth`: a slice of a large model with random weights, to try a machine with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import bytes_text, can_draw

LINE_STEP = 10  # without a terminal: a line whenever another so many hundredths are done


def synth(
    shape: Annotated[
        str, typer.Argument(help="deepseek-v4.1-flash, or v41-tiny for tests.", show_default=False)
    ],
    layers: Annotated[int, typer.Option(help="Number of layers, 3 to 40.", show_default=False)],
    engram_rows: Annotated[
        int, typer.Option(help="Approximate rows of each Engram table.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="New directory to write.", show_default=False)],
    experts: Annotated[
        int | None,
        typer.Option(min=1, help="Routed experts per layer. Default: as in the model.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the random weights.")] = 0,
) -> None:
    """Write a checkpoint with a large model's real dimensions and formats, few layers and random weights.

    Such a slice loads, serves and moves bytes as the full model would; its output is meaningless.

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

    from engine.synthetic import plan_slice
    from memory.checkpoint.random_files import write_checkpoint

    plan = plan_slice(shape, layers, engram_rows, experts)
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

        write_checkpoint(plan, out, on_progress, seed=seed)
    seconds = time.perf_counter() - start
    speed = bytes_text(int(plan.nbytes / seconds))
    print(f"{out}: {bytes_text(plan.nbytes)} in {seconds:.0f} s ({speed}/s); try `loci bench slice {out}`")
