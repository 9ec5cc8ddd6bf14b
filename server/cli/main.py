"""The console script `loci`: errors and signals become a line and an exit code, from the first instant on."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from server.cli.process import (
    INTERRUPTED,
    TERMINATED,
    end_now,
    exit_code,
    flush_stdout,
    handle_signals,
    ignore_signals,
    open_standard_streams,
    was_interrupted,
)
from server.cli.terminal import wants_plain_text


def process() -> None:
    """Run the command line as a process of its own: `main`, without taking the interpreter apart afterwards.

    That takes half a second where torch is loaded, and several beside other programs.
    """
    codes: list[int] = []
    atexit.register(lambda: end_now(codes[0]) if codes else None)  # the first one registered runs last
    try:
        main()
        codes.append(0)
    except SystemExit as end:
        codes.append(exit_code(end))
        raise


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 told to end.

    LOCI_DEBUG=1 shows tracebacks.
    """
    handle_signals()
    open_standard_streams()
    # OpenMP's threads wait for each other by spinning unless told otherwise before torch is loaded.
    # Where another program keeps a core busy, that made steps of a small model 60 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch then asks for huge pages where it allocates megabytes: processors foresee no addresses beyond a
    # page, and have to look up where each page lies (figures in docs/kernels.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A stream that waits for the processor holds up those that share its queue on the GPU. There are 8 queues
    # unless CUDA is told otherwise before it starts, and 32 at most.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if wants_plain_text():
        # For libraries that draw: without colour, or on a terminal that has no name, they would still write
        # bold letters and move the cursor.
        os.environ["TERM"] = "dumb"
    try:
        os.getcwd()
    except FileNotFoundError:  # torch's libraries would abort the process
        sys.exit("loci: the current directory has been removed; change to another")
    try:
        # Imported here: what the commands need takes half a second, in which a person may press Ctrl-C.
        from memory.hardware.detect import allowed_cores, usable_cores

        # torch, whose number all kernels go by, counts the cores that it may run on, not their time
        # a container gets: threads above that would be stopped in turn, and the others wait for them.
        if usable_cores() < allowed_cores():
            os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
        from server.cli.commands import app

        app()
    except KeyboardInterrupt:
        end_now(INTERRUPTED)
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            end_now(end.code)
        _flush()
        raise
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> None:
    from quant.errors import LociError

    if was_interrupted(error):
        end_now(INTERRUPTED)
    _flush()
    if os.environ.get("LOCI_DEBUG"):
        raise error
    if isinstance(error, ImportError):
        _lacks(error)
    if isinstance(error, LociError):
        sys.exit(f"loci: {error}")
    if isinstance(error, OSError) and error.strerror:
        sys.exit(f"loci: {error.filename}: {error.strerror}" if error.filename else f"loci: {error.strerror}")
    sys.exit(f"loci: unexpected {type(error).__name__}: {error}")


def _lacks(error: ImportError) -> NoReturn:
    if sys.argv[1:] == ["doctor"]:
        from server.cli.doctor import report

        os.environ["NO_COLOR"] = "1"  # what draws may be what is missing
        report(str(error))
    sys.exit(f"loci: {error}; `loci doctor` says what is missing and what to do about it")


def _flush() -> None:
    # What remains is to end threads: a signal would kill what is already done.
    atexit.register(ignore_signals)
    problem = flush_stdout()
    if problem is not None:
        sys.exit(f"loci: cannot write to stdout: {problem}" if problem else 1)


if __name__ == "__main__":
    process()
