"""Output for people and for pipes: tables with rich on a terminal, aligned columns elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from quant.errors import ConfigError


def is_terminal() -> bool:
    """True where a person reads stdout."""
    return sys.stdout.isatty()


def can_draw(stream: TextIO | None = None) -> bool:
    """True where `stream` (stdout) is a terminal that may get colours and a moving cursor."""
    return (stream or sys.stdout).isatty() and not wants_plain_text()


def wants_plain_text() -> bool:
    """True where the environment says that terminals get nothing but text."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "") in ("", "dumb", "unknown")


def confirm(question: str, *, unasked: str, refused: str) -> None:
    """Ask on stderr for a yes or no; no is the default, and what the end of input means.

    Raises ConfigError saying `unasked` where nobody can be asked, and `refused` where the answer is no.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(unasked)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError(refused)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on stdout; the columns in `right` are aligned to the right."""
    if can_draw():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD)
        for i, header in enumerate(headers):
            table.add_column(header, justify="right" if i in right else "left")
        for row in rows:
            table.add_row(*row)
        Console().print(table, markup=False)
        return
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


# A model may write escape sequences, which a terminal would obey.
_CONTROLS = {c: None for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


def printable(text: str) -> str:
    """`text` without the control characters that a terminal would obey."""
    return text.translate(_CONTROLS)


def write(text: str, *, dim: bool = False) -> None:
    """`text` at once; through a pipe as it is, on a terminal without control characters, dimmed if asked."""
    if is_terminal():
        text = printable(text)
        if dim and can_draw():
            text = f"\x1b[2m{text}\x1b[0m"
    sys.stdout.write(text)
    sys.stdout.flush()


def bytes_text(nbytes: int) -> str:
    """Decimal units, three digits."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
