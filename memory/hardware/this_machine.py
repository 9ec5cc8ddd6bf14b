"""This machine as a hardware profile: detected, measured and assumed values.

Measurements come from `loci bench hardware`, which leaves them in the user's cache. They are used as
long as processor, memory and GPUs are the ones they were made on; of a disk, for files on that disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.hardware.detect import Machine, detect
from memory.hardware.profiles import ROWS_PER_CORE, GpuSpec, HardwareProfile
from memory.user_files import user_cache, whole_file
from quant.errors import ConfigError

MAX_CACHE_BYTES = 1 << 20
# What a machine of the last ten years has at least; used where nothing was measured, and said.
ASSUMED_DRAM_BYTES_PER_S = 30e9
ASSUMED_DISK_BYTES_PER_S = 1.5e9
ASSUMED_DISK_READS_PER_S = 100_000.0
ASSUMED_LINK_BYTES_PER_S = 12e9
ASSUMED_VRAM_BYTES_PER_S = 500e9
ASSUMED_GPU_FLOPS = 50e12
ASSUMED_CORE_FLOPS = {"portable": 3e9, "avx2": 25e9, "avx512": 60e9}
# Left to the system and to what else runs, or a sixteenth of what is free.
DRAM_KEPT_FREE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Result:
    """One measured value. `target` and `met` stay empty where nothing was promised."""

    name: str
    value: float
    unit: str
    target: float | None = None
    met: bool | None = None


def machine_facts(machine: Machine) -> dict[str, Any]:
    """What identifies a machine in a report of measurements."""
    return {
        "system": machine.system,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "cpu_flags": list(machine.cpu_flags),
        "memory_bytes": machine.memory_bytes,
        "numa_nodes": machine.numa_nodes,
        "gpus": [gpu.name for gpu in machine.gpus],
        "disks": [f"{disk.name} {disk.model}".strip() for disk in machine.disks],
    }


def cache_path() -> Path:
    """Where measurements are kept: `$XDG_CACHE_HOME/loci/hardware.json`, or below `~/.cache`."""
    return user_cache() / "hardware.json"


def quick_path() -> Path:
    """Where a server keeps what it has seen of the machine in a moment, until it is measured."""
    return user_cache() / "hardware-seen.json"


def disk_of(path: Path) -> int:
    """The number of the device that a file or directory is on."""
    return path.stat().st_dev


def write_results(path: Path, machine: Machine, results: Sequence[Result], disk: int | None = None) -> None:
    """Write measurements as JSON, atomically; `disk` is the one that was measured (`disk_of`)."""
    facts = machine_facts(machine) | ({} if disk is None else {"disk": disk})
    report = {"machine": facts, "results": [vars(result) for result in results]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); choose another path") from None


def kept_rates(machine: Machine, disk: int | None = None) -> dict[str, float]:
    """All that is known of this machine: what was measured, and what a server has seen."""
    return read_measured(machine, quick_path(), disk) | read_measured(machine, disk=disk)


def read_measured(machine: Machine, path: Path | None = None, disk: int | None = None) -> dict[str, float]:
    """Measured values by name; none where there are none, or where they are another machine's.

    disk  the one that counts: rates of others are left out; None for whichever was measured
    """
    path = path or cache_path()
    try:
        if path.stat().st_size > MAX_CACHE_BYTES:
            return {}
        report = json.loads(path.read_text())
        facts = report["machine"]
        is_same = all(
            facts[key] == value for key, value in machine_facts(machine).items() if key in _IDENTITY
        )
        if not is_same:
            return {}
        values = {str(item["name"]): float(item["value"]) for item in report["results"]}
        if disk is not None and facts.get("disk") != disk:
            values = {name: value for name, value in values.items() if not name.startswith("disk_")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # measuring again fixes it
    if values.get("dram_read", 0.0) < values.get("dram_read_1_thread", 0.0):
        values.pop("dram_read", None)  # measured while something else kept the cores busy
    return {name: value for name, value in values.items() if math.isfinite(value) and value > 0}


_IDENTITY = ("cpu", "cores", "gpus")


def this_machine(machine: Machine | None = None, measured: dict[str, float] | None = None) -> HardwareProfile:
    """The machine this runs on, with measurements where there are any; `assumed` says what there isn't."""
    machine = machine or detect()
    if measured is None:
        measured = kept_rates(machine)
    assumed: list[str] = []

    def rate(name: str, fallback: float, what: str, unit: str, scale: float = 1e9) -> float:
        if name in measured:
            return measured[name] * scale
        assumed.append(f"{what}: {fallback / scale:.3g} {unit} (`loci bench hardware` measures it)")
        return fallback

    level = "portable"
    if "avx512_vnni" in machine.cpu_flags:
        level = "avx512"
    elif "avx2" in machine.cpu_flags:
        level = "avx2"
    dram = rate("dram_read", ASSUMED_DRAM_BYTES_PER_S, "DRAM read bandwidth", "GB/s")
    flops = rate("cpu_matmul", machine.cores * ASSUMED_CORE_FLOPS[level], "CPU arithmetic", "GFLOP/s")
    disk = rate("disk_read", ASSUMED_DISK_BYTES_PER_S, "sequential disk reads", "GB/s")
    reads = rate("disk_random_reads", ASSUMED_DISK_READS_PER_S, "random disk reads", "reads/s", 1.0)
    gpus = []
    for gpu in machine.gpus:
        i = gpu.index
        usual = gpu.pcie.usable_bytes_per_s if gpu.pcie else ASSUMED_LINK_BYTES_PER_S
        alone = rate(f"link_{i}", usual, f"link of GPU {i}", "GB/s")
        gpus.append(
            GpuSpec(
                name=gpu.name,
                kind="cuda",
                memory_bytes=gpu.free_bytes,
                memory_bytes_per_s=gpu.memory_bytes_per_s
                or rate(f"vram_{i}", ASSUMED_VRAM_BYTES_PER_S, f"VRAM of GPU {i}", "GB/s"),
                matmul_flops=rate(f"gpu_matmul_{i}", ASSUMED_GPU_FLOPS, f"GPU {i}", "TFLOP/s", 1e12),
                link_bytes_per_s=alone,
                link_together_bytes_per_s=min(alone, measured.get(f"link_{i}_together", alone / 1e9) * 1e9),
            )
        )
    experts, fp8 = measured.get("cpu_experts"), measured.get("cpu_matmul_fp8")
    rearranged = measured.get("expert_rearranged_1_thread")
    return HardwareProfile(
        name="this",
        description=f"this machine: {machine.cpu}, {machine.cores} cores",
        cores=machine.cores,
        cpu_level=level,
        cpu_matmul_flops=flops,
        expert_bytes_per_s=experts * 1e9 if experts else None,
        dram_bytes=machine.available_bytes - min(DRAM_KEPT_FREE_BYTES, machine.available_bytes // 16),
        dram_bytes_per_s=dram,
        dram_rows_per_s=measured.get("dram_random_rows", machine.cores * ROWS_PER_CORE),
        disk_bytes=machine.disk_free_bytes,
        disk_bytes_per_s=disk,
        disk_reads_per_s=reads,
        gpus=tuple(gpus),
        assumed=tuple(assumed),
        cpu_fp8_flops=fp8 * 1e9 if fp8 else None,
        rearranged_per_core=rearranged * 1e9 if rearranged else None,
    )
