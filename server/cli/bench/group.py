"""`loci bench ...`: measurements, each with a table and, where asked, JSON."""

from __future__ import annotations

import typer

from server.cli.bench import (
    engram as cli_bench_engram,
)
from server.cli.bench import (
    experts as cli_bench_experts,
)
from server.cli.bench import (
    hardware as cli_bench_hardware,
)
from server.cli.bench import (
    kernels as cli_bench_kernels,
)
from server.cli.bench import (
    serve as cli_bench_serve,
)
from server.cli.bench import (
    slice as cli_bench_slice,
)

bench = typer.Typer(name="bench", help="Measure this machine and Loci on it.", no_args_is_help=True)
bench.command()(cli_bench_hardware.hardware)
bench.command()(cli_bench_experts.experts)
bench.command()(cli_bench_engram.engram)
bench.command()(cli_bench_kernels.kernels)
bench.command()(cli_bench_serve.serve)
bench.command("slice")(cli_bench_slice.slice_)
