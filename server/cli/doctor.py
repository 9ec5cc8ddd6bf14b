"""`loci doctor`: what this machine has, what is missing for Loci, and what to do about it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.distribution import required_packages, version_of
from engine.embedded import EMBEDDED, model_path
from quant.errors import LociError
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from memory.hardware.detect import HugePages, Machine

MODEST_MEMORY_BYTES = 2_000_000_000
MODEST_DISK_BYTES = 1_000_000_000
_INSTALL = "install Loci with its dependencies (in its folder: make clean, then make serve)"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is empty where all is well; `is_fatal` means Loci cannot run."""

    topic: str
    found: str
    advice: str = ""
    is_fatal: bool = False

    @property
    def verdict(self) -> str:
        """`ok`, `note` or `missing`."""
        return "missing" if self.is_fatal else "note" if self.advice else "ok"


def doctor() -> None:
    """Check Python, packages, CPU, GPUs, memory and disk. The exit code is 1 if Loci cannot run.

    Example: loci doctor
    """
    report()


def report(obstacle: str | None = None) -> None:
    """What `loci doctor` prints; `obstacle` is why no other command can start.

    Needs nothing but Python itself, so that it can say which package is missing.
    """
    findings = [*_python(), *_packages()]
    if obstacle is not None:
        findings.append(Finding("start", obstacle, _INSTALL, is_fatal=True))
    for topic, look in ("machine", _machine), ("kernels", _kernels), ("models", _embedded_models):
        findings += _looked_at(topic, look)
    print_table(["", "what", "found"], [(f.verdict, f.topic, f.found) for f in findings])
    advice = [f"{f.topic}: {f.advice}" for f in findings if f.advice]
    if advice:
        print("\nWhat to do:\n" + "\n".join(f"  - {line}" for line in advice))
    if any(f.is_fatal for f in findings):
        sys.exit(1)


def _looked_at(topic: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What `look` finds, until a package that it needs is missing or broken."""
    try:
        yield from look()
    except (ImportError, OSError) as error:
        yield Finding(topic, f"cannot be looked at: {error}", _INSTALL, is_fatal=True)


def _python() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    required = required_packages()
    missing = [package for package in required if version_of(package) is None]
    if missing:
        advice = f"install Loci with its dependencies, or: pip install {' '.join(missing)}"
        yield Finding("packages", f"without {', '.join(missing)}", advice, is_fatal=True)
    elif required:
        found = f"torch {version_of('torch')}, and the {len(required) - 1} others Loci needs"
        yield Finding("packages", found)
    else:
        advice = "run `make serve` or `pip install .` in its folder to install what it needs"
        yield Finding("packages", "Loci runs from its source and is not installed", advice)


def _machine() -> Iterator[Finding]:
    from memory.hardware.detect import detect

    machine = detect()
    yield Finding("system", machine.system)
    slow = not {"avx2", "asimd"} & set(machine.cpu_flags)
    flags = " ".join(machine.cpu_flags) or "no vector extensions"
    yield Finding(
        "processor",
        f"{machine.cpu}, {machine.cores} cores usable, {flags}",
        "without AVX2 or NEON, only slow portable code runs; use a newer machine" if slow else "",
    )
    memory = f"{bytes_text(machine.memory_bytes)}, {bytes_text(machine.available_bytes)} available"
    if machine.memory_limit_bytes is not None:
        memory += f", this container may use {bytes_text(machine.memory_limit_bytes)}"
    yield Finding("memory", memory, _room_advice("memory", machine.available_bytes, MODEST_MEMORY_BYTES))
    yield from _huge_pages(machine.huge_pages)
    if machine.numa_nodes > 1:
        yield Finding("NUMA", f"{machine.numa_nodes} nodes; memory on other nodes is slower")
    free = machine.disk_free_bytes
    yield Finding(
        "disk",
        f"{bytes_text(free)} free in {Path.cwd()}",
        _room_advice("disk space", free, MODEST_DISK_BYTES),
    )
    for disk in machine.disks:
        found = f"{disk.name}, {bytes_text(disk.nbytes)} {disk.model}".rstrip()
        advice = "a hard disk; experts and Engram rows need an SSD" if disk.is_rotational else ""
        yield Finding("drive", found, advice)
    for gpu in machine.gpus:
        capability = ".".join(map(str, gpu.capability))
        found = f"{gpu.name}, {bytes_text(gpu.free_bytes)} of {bytes_text(gpu.memory_bytes)} free"
        found += f", sm {capability}"
        if gpu.pcie is not None:
            found += f", PCIe {gpu.pcie.generation}.0 x{gpu.pcie.lanes}"
        if gpu.peers:
            found += f", peer access to {', '.join(map(str, gpu.peers))}"
        yield Finding(f"GPU {gpu.index}", found)
    yield from _gpu_software(machine)


def _huge_pages(found: HugePages) -> Iterator[Finding]:
    """Weights lie in huge pages where the system makes them; what is set aside for others is lost to them."""
    if found.mode:
        never = "for faster reads of weights: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("huge pages", found.mode, never if found.mode == "never" else "")
    if found.reserved_bytes:
        advice = "Loci cannot use them; sysctl vm.nr_hugepages=0 gives them back, if nothing else needs them"
        yield Finding("huge pages", f"{bytes_text(found.reserved_bytes)} reserved", advice)


def _gpu_software(machine: Machine) -> Iterator[Finding]:
    """What GPUs need beside themselves, where it is missing."""
    from memory.hardware.detect import has_nvidia_driver

    if not machine.gpus:
        found = "none that PyTorch can use; everything is computed on the CPU"
        yield Finding("GPU", found, _unused_gpu_advice() if has_nvidia_driver() else "")
    elif version_of("triton") is None:
        advice = "run pip install 'triton>=3.3'; without it, --devices cuda is refused"
        yield Finding("Triton", "not installed", advice)


def _unused_gpu_advice() -> str:
    torch_version = version_of("torch") or ""
    if torch_version.endswith("+cpu"):
        return (
            f"this machine has an NVIDIA driver, but torch {torch_version} is built for CPUs only; for "
            "PyTorch with CUDA, in Loci's folder: make clean, then make serve TORCH_INDEX="
        )
    return "this machine has an NVIDIA driver, but torch finds no GPU; check nvidia-smi"


def _room_advice(what: str, available: int, modest: int) -> str:
    return (
        f"less than {bytes_text(modest)} of {what} is free; free some for a model"
        if available < modest
        else ""
    )


def _kernels() -> Iterator[Finding]:
    if version_of("torch") is None:
        return
    from quant.kernels.choice import choose
    from quant.kernels.reference import ReferenceKernels

    kernels = choose()
    found = f"{kernels.name}: {kernels.describe()}"
    if isinstance(kernels, ReferenceKernels):
        advice = (
            "answers are many times slower than they could be; install a C++ compiler (Debian: apt-get "
            "install g++), then Loci again (in its folder: make serve, which compiles now)"
        )
        yield Finding("kernels", f"SLOW, {found}", advice)
    else:
        yield Finding("kernels", found)


def _embedded_models() -> Iterator[Finding]:
    for name in EMBEDDED:
        try:
            yield Finding(f"embedded model {name}", str(model_path(Path(name))))
        except LociError as error:
            yield Finding(f"embedded model {name}", "not installed", str(error))
