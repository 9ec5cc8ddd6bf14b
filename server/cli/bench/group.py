"""`loci bench ...`: measurements, each with a table and, where asked, JSON."""

from __future__ import annotations

import typer

from server.cli.bench.cluster import cluster
from server.cli.bench.context import context
from server.cli.bench.drafts import drafts
from server.cli.bench.engram import engram
from server.cli.bench.experts import experts
from server.cli.bench.hardware import hardware
from server.cli.bench.kernels import kernels
from server.cli.bench.peers import peers
from server.cli.bench.plan import plan_
from server.cli.bench.prefill import prefill
from server.cli.bench.serve import serve
from server.cli.bench.slice import slice_
from server.cli.bench.step import step

bench = typer.Typer(
    name="bench",
    help="Measure this machine and Loci on it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
bench.command()(hardware)
bench.command()(experts)
bench.command()(engram)
bench.command()(kernels)
bench.command()(serve)
bench.command()(peers)
bench.command()(step)
bench.command("slice")(slice_)
bench.command()(prefill)
bench.command("plan")(plan_)
bench.command()(context)
bench.command()(drafts)
bench.command()(cluster)
