"""`loci bench hardware`: measure what plans for this machine rest on, and keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.arguments import JsonFile, can_be_written
from server.cli.progress import progress
from server.cli.terminal import print_table

DISK_BYTES = 1 << 30
DISK_SHARE = 10  # of the free space, at most this part is written


def hardware(
    json_file: JsonFile = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Directory on the disk to measure. Default: the current directory.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure DRAM, kernels, links and disk; keep the results for `loci plan --hardware this`.

    Takes about half a minute and, temporarily, 1 GB of memory and 1 GB of disk space.

    Example: loci bench hardware --directory /models
    """
    from memory.hardware.detect import detect
    from memory.hardware.measure import measure_cpu, measure_disk, measure_dram, measure_gpus, working_bytes
    from memory.hardware.this_machine import cache_path, disk_of, write_results

    can_be_written(cache_path())
    where = directory or Path.cwd()
    machine = detect(where)
    stages = (
        lambda: measure_disk(where, min(DISK_BYTES, machine.disk_free_bytes // DISK_SHARE)),
        lambda: measure_dram(working_bytes()),
        lambda: measure_cpu(working_bytes() // 2),
        measure_gpus,
    )
    results = []
    with progress("measuring") as on_progress:
        for number, measure in enumerate(stages):
            on_progress(number, len(stages))
            results += measure()
        on_progress(len(stages), len(stages))
    print_table(["what", "measured", ""], [(r.name, f"{r.value:.3g}", r.unit) for r in results], right=(1,))
    if not any(r.name == "disk_read" for r in results):
        print(f"{where}: this file system does not support direct reads; choose another with --directory")
    for path in (cache_path(), *([json_file] if json_file else [])):
        write_results(path, machine, results, disk_of(where))
        print(f"written to {path}")
