"""A look at this machine that takes seconds: rates that plans rest on, where `loci bench hardware` has not
measured them. What was seen is kept in the user's cache, for as long as the machine is the same; of a disk,
as long as that is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from memory.hardware.detect import Machine, available_memory_bytes
from memory.hardware.this_machine import (
    Result,
    disk_of,
    kept_rates,
    quick_path,
    read_measured,
    write_results,
)
from quant.errors import ConfigError, LociError

logger = logging.getLogger("loci.memory")

DRAM_BYTES = 128 << 20  # beyond most caches, and read in a moment
CPU_BYTES = 64 << 20
DISK_SECONDS = 0.15  # at each depth
BUDGET_S = 8.0  # after which nothing more is begun
BUSY = 0.7  # of the cores at work for others: what is seen then counts for this start alone
CPU_RATES = ("cpu_experts", "expert_rearranged_1_thread", "cpu_matmul", "cpu_matmul_fp8")
GPU_RATES = ("link_0", "gpu_matmul_0")


def known_rates(machine: Machine, file: Path | None = None, *, seconds: float = BUDGET_S) -> dict[str, float]:
    """What was measured of this machine, by name; what was not is measured now, for so long at most.

    file  a large one on the disk that the model is read from
    """
    disk = None if file is None else disk_of(file)
    known = kept_rates(machine, disk)
    begun, found = time.monotonic(), []
    is_busy = os.getloadavg()[0] > BUSY * machine.cores
    for names, measure in _stages(machine, file):
        if all(name in known for name in names) or time.monotonic() - begun > seconds:
            continue
        try:
            found += measure()
        except (LociError, OSError, RuntimeError, AssertionError) as error:  # what is not known is assumed
            logger.info("not measured: %s", error)
    if found and not is_busy:
        new = {result.name for result in found}
        seen = read_measured(machine, quick_path(), disk).items()
        kept = [Result(name, value, "") for name, value in seen if name not in new]
        try:
            write_results(quick_path(), machine, [*kept, *found], disk)
        except ConfigError as error:
            logger.info("not kept: %s", error)
    return {result.name: result.value for result in found} | known


def _stages(
    machine: Machine, file: Path | None
) -> Iterator[tuple[tuple[str, ...], Callable[[], list[Result]]]]:
    """Names of what each finds, and how."""
    from memory.hardware import measure

    few = available_memory_bytes() // 16
    yield ("dram_read",), lambda: measure.measure_dram(min(DRAM_BYTES, few))
    yield CPU_RATES, lambda: measure.measure_cpu(min(CPU_BYTES, few))
    if file is not None:
        yield ("disk_read",), lambda: _disk(file)
    if machine.gpus:
        yield GPU_RATES, measure.measure_gpus


def _disk(file: Path) -> list[Result]:
    """Reads of the checkpoint itself: nothing is written."""
    from memory.hardware.measure import read_rates

    rates = read_rates(file, DISK_SECONDS)
    return [Result("disk_read", max(rates) / 1e9, "GB/s")] if rates else []
