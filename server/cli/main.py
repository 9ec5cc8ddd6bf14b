"""The console script `loci`: assembles the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys

import typer

from memory.hardware.detect import allowed_cores, usable_cores
from quant.errors import LociError
from server.cli.bench.group import bench
from server.cli.chat import chat, run
from server.cli.demo import demo
from server.cli.doctor import doctor
from server.cli.info import info
from server.cli.logits import logits
from server.cli.plan import plan
from server.cli.profile import profile
from server.cli.quantize import quantize
from server.cli.serve import serve
from server.cli.synth import synth
from server.cli.top import top

app = typer.Typer(
    name="loci",
    help="A local inference server for frontier mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(chat)
app.command()(run)
app.command()(demo)
app.command()(info)
app.command()(logits)
app.command()(plan)
app.command()(quantize)
app.command()(profile)
app.command()(synth)
app.command()(top)
app.command()(doctor)
app.add_typer(bench)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 told to end.

    LOCI_DEBUG=1 shows tracebacks.
    """
    # OpenMP's threads wait for each other by spinning unless told otherwise before torch is loaded.
    # Where another program keeps a core busy, that made steps of a small model 60 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch then asks for huge pages where it allocates megabytes: processors foresee no addresses beyond a
    # page, and have to look up where each page lies (figures in docs/kernels.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # torch, whose number all kernels go by, counts the cores that it may run on, not how much of their time a
    # container gets: threads above that would be stopped in turn, those that the others wait for among them.
    if usable_cores() < allowed_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    # As after Ctrl-C, what is half written is removed. `loci serve` drains instead.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("LOCI_DEBUG"):
            raise
        unexpected = "" if isinstance(error, LociError) else f"unexpected {type(error).__name__}: "
        sys.exit(f"loci: {unexpected}{error}")


if __name__ == "__main__":
    main()
