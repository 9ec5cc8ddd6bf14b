"""`loci bench kernels`: how close the kernels come to what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.arguments import JsonFile
from server.cli.bench.figures import print_figures, results_of


def kernels(
    json_file: JsonFile = None,
    gpu: Annotated[
        int | None,
        typer.Option(
            min=0, help="Measure the kernels of this CUDA GPU instead of the CPU's.", show_default=False
        ),
    ] = None,
    is_quick: Annotated[
        bool,
        typer.Option("--quick", help="Run only a few iterations, as a smoke test; the figures mean little."),
    ] = False,
) -> None:
    """Compare quantised matrix products with plain reads, with torch and with llama.cpp.

    Takes a few minutes and up to 3 GB of memory. llama.cpp is included if the extra `ggml` is installed.
    On a GPU: half a minute and 3 GB of its memory; bitsandbytes is included.

    Example: loci bench kernels --json kernels.json
    """
    from memory.hardware.detect import detect
    from memory.hardware.measure import working_bytes
    from memory.hardware.this_machine import write_results
    from quant.bench.gpu import measure_gpu
    from quant.bench.kernels import MIN_BYTES, Effort, measure_kernels
    from quant.kernels.choice import choose

    effort = Effort(MIN_BYTES, 2, 1) if is_quick else Effort(working_bytes(), 40, 8)
    if gpu is None:
        print(choose().describe())
    results = []
    for topic, figures in measure_kernels(effort) if gpu is None else measure_gpu(gpu, effort.turns):
        print()
        print_figures(topic, figures)
        results += results_of(figures)
    if json_file is not None:
        write_results(json_file, detect(), results)
        print(f"written to {json_file}")
