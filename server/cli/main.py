"""The console script `loci`: assembles the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys

import typer

from quant.errors import LociError
from server.cli import (
    chat as cli_chat,
)
from server.cli import (
    demo as cli_demo,
)
from server.cli import (
    doctor as cli_doctor,
)
from server.cli import (
    info as cli_info,
)
from server.cli import (
    logits as cli_logits,
)
from server.cli import (
    plan as cli_plan,
)
from server.cli import (
    profile as cli_profile,
)
from server.cli import (
    quantize as cli_quantize,
)
from server.cli import (
    serve as cli_serve,
)
from server.cli import (
    synth as cli_synth,
)
from server.cli import (
    top as cli_top,
)
from server.cli.bench import group as cli_bench

app = typer.Typer(
    name="loci",
    help="A local inference server for frontier mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(cli_serve.serve)
app.command()(cli_chat.chat)
app.command()(cli_chat.run)
app.command()(cli_demo.demo)
app.command()(cli_info.info)
app.command()(cli_logits.logits)
app.command()(cli_plan.plan)
app.command()(cli_quantize.quantize)
app.command()(cli_profile.profile)
app.command()(cli_synth.synth)
app.command()(cli_top.top)
app.command()(cli_doctor.doctor)
app.add_typer(cli_bench.bench)


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
