"""`loci bench ...`: measurements, each with a table and, where asked, JSON."""

from __future__ import annotations

import typer

from server import (
    cli_bench_engram,
    cli_bench_experts,
    cli_bench_hardware,
    cli_bench_kernels,
    cli_bench_serve,
    cli_bench_slice,
)

bench = typer.Typer(name="bench", help="Measure this machine and Loci on it.", no_args_is_help=True)
bench.command()(cli_bench_hardware.hardware)
bench.command()(cli_bench_experts.experts)
bench.command()(cli_bench_engram.engram)
bench.command()(cli_bench_kernels.kernels)
bench.command()(cli_bench_serve.serve)
bench.command("slice")(cli_bench_slice.slice_)
