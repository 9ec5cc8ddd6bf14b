"""Figures with what was promised of them: as a table, and as results for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.cli.terminal import print_table

if TYPE_CHECKING:
    from memory.hardware.this_machine import Result
    from quant.bench.timing import Figure


def print_figures(topic: str, figures: Sequence[Figure | Result]) -> None:
    """A table of figures, with their targets and whether they were met."""
    print_table(
        [topic, "measured", "", "target", "met"],
        [
            (
                figure.name,
                f"{figure.value:.3g}",
                figure.unit,
                "" if figure.target is None else f"{figure.target:g}",
                {None: "", True: "yes", False: "no"}[figure.met],
            )
            for figure in figures
        ],
        right=(1, 3),
    )


def results_of(figures: Sequence[Figure]) -> list[Result]:
    """The figures as they are written to a file."""
    from memory.hardware.this_machine import Result

    return [Result(f.name, f.value, f.unit, f.target, f.met) for f in figures]
