"""What a command is as a process: its signals, its standard streams, and how it ends."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_IMPORTS = "<frozen importlib._bootstrap>"


def handle_signals() -> None:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM SystemExit; so what is half written is removed.

    While modules are imported either one ends the process at once: extension modules may swallow an exception
    that comes then, or go on half initialised.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            end_now(128 + number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def ignore_signals() -> None:
    """From now on the process ends in the way that it is ending already."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_now(code: int) -> NoReturn:
    """End without waiting for threads: one that is inside native code would abort the interpreter."""
    ignore_signals()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, RuntimeError):  # closed, or interrupted while it was flushed
            continue
    os._exit(code)


def exit_code(end: SystemExit) -> int:
    """What the process returns that ends so; a message counts as failure, as for the interpreter."""
    if end.code is None:
        return 0
    return end.code if isinstance(end.code, int) else 1


def was_interrupted(error: BaseException | None) -> bool:
    """Whether `error` came of a KeyboardInterrupt, which some libraries answer with one of their own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def open_standard_streams() -> None:
    """Make stdin, stdout and stderr usable: closed ones lead nowhere, and any text can be written."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the number; else the next file opened would
            assert opened == number
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's may be another
            stream.reconfigure(errors="replace")


def flush_stdout() -> str | None:
    """Write what stdout still holds; where that fails, why (empty where only nobody reads it any more)."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more when it ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return "" if isinstance(error, BrokenPipeError) else str(error.strerror)
    return None
