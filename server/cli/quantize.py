"""`loci quantize`: a checkpoint in other formats."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import Model, can_be_written
from server.cli.terminal import bytes_text, can_draw, print_table

if TYPE_CHECKING:
    from engine.bench.evaluate import Evaluation
    from memory.convert.files import OnProgress, TensorError
    from memory.convert.plan import Choices


class Experts(StrEnum):
    """Values of --experts."""

    MXFP4 = "mxfp4"
    NF4 = "nf4"
    INT4 = "int4"
    KEEP = "keep"


class Dense(StrEnum):
    """Values of --dense."""

    FP8 = "fp8"
    BF16 = "bf16"
    KEEP = "keep"


class Engram(StrEnum):
    """Values of --engram."""

    FP8 = "fp8"
    FP4 = "fp4"
    KEEP = "keep"


class Group(StrEnum):
    """Values of --int4-group."""

    G32 = "32"
    G64 = "64"
    G128 = "128"


def quantize(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="New directory to write.", show_default=False)],
    experts: Annotated[Experts, typer.Option(help="Format of the routed experts.")] = Experts.KEEP,
    dense: Annotated[Dense, typer.Option(help="Format of dense matrices.")] = Dense.KEEP,
    engram: Annotated[Engram, typer.Option(help="Format of Engram tables.")] = Engram.KEEP,
    int4_group: Annotated[Group, typer.Option(help="Columns per INT4 scale.")] = Group.G32,
    int4_offset: Annotated[
        bool, typer.Option("--int4-offset", help="Give INT4 groups an offset as well as a scale.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write each matrix's error to this JSON file.", callback=can_be_written, show_default=False
        ),
    ] = None,
    eval_text: Annotated[
        Path | None,
        typer.Option("--eval", help="Evaluate both checkpoints on this text file.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads. Default: all cores.", show_default=False)
    ] = None,
) -> None:
    """Convert a checkpoint to other formats. If interrupted, run the same command again to resume.

    Example: loci quantize ./DeepSeek-V4.1-Flash ./flash-nf4 --experts nf4
    """
    if source.is_file():
        raise ConfigError(
            f"{source}: expected a safetensors directory; GGUF files can be served, but not converted"
        )
    if report is not None and not report.parent.is_dir():
        raise ConfigError(f"{report.parent}: no such directory to write to")
    if eval_text is not None:
        from engine.bench.evaluate import read_text

        read_text(eval_text)  # refused now rather than hours later
    choices = _choices(experts, dense, engram, int(int4_group), int4_offset)

    from memory.convert.files import convert_checkpoint

    with _Progress() as on_progress:
        errors = convert_checkpoint(source, destination, choices, on_progress, workers)
    _print_summary(errors)
    evaluation = None
    if eval_text is not None:
        from engine.bench.evaluate import compare

        evaluation = compare(source, destination, eval_text)
        print(
            f"{evaluation.tokens} tokens of {eval_text.name}: perplexity {evaluation.perplexity_before:.4f} "
            f"before, {evaluation.perplexity_after:.4f} after; KL {evaluation.mean_kl:.5f}, same most "
            f"likely token {evaluation.top1_agreement:.2%}"
        )
    if report is not None:
        _write_report(report, source, destination, errors, evaluation)
    print(f'{destination}: converted and read back; try `loci run {destination} "Hello"`')


def _choices(experts: Experts, dense: Dense, engram: Engram, group: int, offset: bool) -> Choices:
    import torch

    from memory.convert.plan import Choices
    from quant.formats.fp8 import FP8_32, FP8_ROW
    from quant.formats.int4 import INT4_GROUPS, INT4_OFFSET_GROUPS
    from quant.formats.mxfp4 import MXFP4
    from quant.formats.nf4 import NF4

    if (experts, dense, engram) == (Experts.KEEP, Dense.KEEP, Engram.KEEP):
        raise ConfigError("nothing to convert: give --experts, --dense or --engram a format")
    int4 = (INT4_OFFSET_GROUPS if offset else INT4_GROUPS)[group]
    return Choices(
        experts={Experts.MXFP4: MXFP4, Experts.NF4: NF4, Experts.INT4: int4}.get(experts),
        dense=FP8_32 if dense is Dense.FP8 else torch.bfloat16 if dense is Dense.BF16 else None,
        engram={Engram.FP8: FP8_ROW, Engram.FP4: MXFP4}.get(engram),
    )


# Without a terminal: a line whenever another so many hundredths are done.
LINE_STEP = 5


class _Progress:
    """A bar with bytes, bytes per second and time left; plain lines where nobody watches."""

    def __enter__(self) -> OnProgress:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._watched = can_draw()
        speed = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(TextColumn("converting"), BarColumn(), *speed, disable=not self._watched)
        self._task = self._bar.add_task("converting", total=None)
        self._next_line = LINE_STEP
        self._bar.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _update(self, done: int, total: int) -> None:
        task = self._bar.tasks[self._task]
        if task.total is None and done:
            print(f"resuming: {bytes_text(done)} of {bytes_text(total)} already done")
        self._bar.update(self._task, completed=done, total=total)
        share = 100 * done // total if total else 100
        if not self._watched and share >= self._next_line:
            self._next_line = share // LINE_STEP * LINE_STEP + LINE_STEP
            speed = f", {bytes_text(int(task.speed))}/s" if task.speed else ""
            left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
            print(f"{share:3d} %  {bytes_text(done)} of {bytes_text(total)}{speed}{left}", flush=True)


def _write_report(
    report: Path,
    source: Path,
    destination: Path,
    errors: list[TensorError],
    evaluation: Evaluation | None,
) -> None:
    value = {
        "source": source.name,
        "destination": destination.name,
        "evaluation": None if evaluation is None else asdict(evaluation),
        "tensors": [asdict(error) for error in errors],
    }
    part = report.with_name(f".{report.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(report)


def _print_summary(errors: list[TensorError]) -> None:
    """One line for each pair of formats."""
    pairs: dict[tuple[str, str], list[TensorError]] = {}
    for error in errors:
        pairs.setdefault((error.source, error.target), []).append(error)
    rows = [
        (
            f"{source} -> {target}",
            f"{len(members)}",
            bytes_text(sum(e.source_bytes for e in members)),
            bytes_text(sum(e.target_bytes for e in members)),
            f"{sum(e.relative_error for e in members) / len(members):.4f}",
            f"{max(e.relative_error for e in members):.4f}",
        )
        for (source, target), members in pairs.items()
    ]
    headers = ["formats", "matrices", "before", "after", "mean relative error", "worst"]
    print_table(headers, rows, right=(1, 2, 3, 4, 5))
