"""How far long work is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from server.cli.terminal import can_draw

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

OnProgress = Callable[[int, int], None]  # done, of how many
LINE_STEP = 10  # without a terminal: a line whenever another so many hundredths are done


def progress(what: str) -> AbstractContextManager[OnProgress]:
    """A function to call with what is done and what there is to do."""
    from rich.progress import MofNCompleteColumn

    return _shown(what, MofNCompleteColumn())


def transfer(what: str) -> AbstractContextManager[OnProgress]:
    """The same for bytes that come or go, with their speed."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _shown(what, DownloadColumn(), TransferSpeedColumn())


@contextmanager
def _shown(what: str, *amounts: ProgressColumn) -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    is_drawn = can_draw(sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn()
    next_line = LINE_STEP
    with Progress(*columns, console=Console(stderr=True), disable=not is_drawn, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def on_progress(done: int, total: int) -> None:
            nonlocal next_line
            bar.update(task, completed=done, total=total)
            share = 100 * done // total if total else 100
            if not is_drawn and share >= next_line:
                next_line = share // LINE_STEP * LINE_STEP + LINE_STEP
                print(f"{what}: {share:3d} %", file=sys.stderr, flush=True)

        yield on_progress
