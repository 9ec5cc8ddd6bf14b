"""Detects this machine's CPU, memory, GPUs and disk. The only reader of /proc and /sys."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from memory.hardware.control_groups import cpu_quota, memory_groups, whole_cores

# Instruction sets that kernels care about, by the names Linux (and Apple's sysctl) give them.
RELEVANT_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use.

    free_bytes              memory that can be allocated now
    pcie                    its link as negotiated, None where the system does not tell
    peers                   GPUs whose memory it can read without the host
    memory_bytes_per_s      bandwidth by the data sheet (clock and bus width), None where unknown
    """

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]
    free_bytes: int = 0
    pcie: PcieLink | None = None
    peers: tuple[int, ...] = ()
    memory_bytes_per_s: float | None = None


@dataclass(frozen=True)
class PcieLink:
    """A PCI Express link: its generation and how many lanes it has."""

    generation: int
    lanes: int

    @property
    def peak_bytes_per_s(self) -> float:
        """The rate on the wire, one way."""
        return self.lanes * 0.985e9 * 2.0 ** (self.generation - 3)

    @property
    def usable_bytes_per_s(self) -> float:
        """What large copies reach: four fifths of the rate on the wire."""
        return 0.8 * self.peak_bytes_per_s


@dataclass(frozen=True)
class Disk:
    """A drive."""

    name: str
    model: str
    nbytes: int
    is_rotational: bool


@dataclass(frozen=True)
class HugePages:
    """Pages of two megabytes or more.

    mode            whether the system makes them: `always`, `madvise` (where asked), `never`; empty where it
                    does not tell
    reserved_bytes  set aside for programs that map them by name, and of no use to others
    """

    mode: str = ""
    reserved_bytes: int = 0


@dataclass(frozen=True)
class Machine:
    """Facts about the machine; sizes in bytes.

    cores               processors this process may keep busy
    memory_limit_bytes  what the container allows, None where nothing does
    available_bytes     memory that can still be taken, the container's limit considered
    disk_free_bytes     on the file system of the directory asked for
    numa_nodes          memories with processors of their own; 1 where all memory is equally near
    """

    system: str
    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    memory_limit_bytes: int | None
    available_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    numa_nodes: int = 1
    disks: tuple[Disk, ...] = ()
    huge_pages: HugePages = HugePages()


def detect(directory: Path | None = None) -> Machine:
    """The machine this runs on; `directory` (default: the current one) says which disk is meant."""
    limits = [group.limit_bytes for group in memory_groups(_read)]
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_field("model name") or platform.processor() or platform.machine(),
        cores=usable_cores(),
        cpu_flags=_cpu_flags(),
        memory_bytes=psutil.virtual_memory().total,
        memory_limit_bytes=min(limits, default=None),
        available_bytes=available_memory_bytes(),
        disk_free_bytes=shutil.disk_usage(directory or Path.cwd()).free,
        gpus=_gpus(),
        numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        disks=_disks(),
        huge_pages=_huge_pages(),
    )


def available_memory_bytes() -> int:
    """Memory that can still be taken without swapping, the limits of all control groups considered."""
    rooms = [group.room_bytes for group in memory_groups(_read)]
    return min([psutil.virtual_memory().available, *rooms])


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def forget_peak() -> bool:
    """Let `peak_resident_bytes` begin anew; False where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """The most memory this process has had in RAM so far, mapped files included."""
    # getrusage also counts what the parent had before exec, so Linux is asked directly.
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is loaded (or, in a virtual machine under Windows, the host's is handed in)."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi"))


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer where its time is limited."""
    allowed = allowed_cores()
    quota = cpu_quota(_read)
    return allowed if quota is None else min(allowed, whole_cores(quota))


def allowed_cores() -> int:
    """Cores that this process may run on, however much of their time it gets."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_field(name: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _cpu_flags() -> tuple[str, ...]:
    present = set((_cpu_field("flags") or _cpu_field("features")).split())
    return tuple(flag for flag in RELEVANT_CPU_FLAGS if flag in present)


def _gpus() -> tuple[Gpu, ...]:
    try:
        import torch
    except (ImportError, OSError):  # missing, or broken
        return ()
    if not torch.cuda.is_available():
        return ()
    found = []
    count = torch.cuda.device_count()
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        # Two transfers a clock (in kHz) over a bus of so many bits.
        clock, bus = getattr(gpu, "memory_clock_rate", 0), getattr(gpu, "memory_bus_width", 0)
        found.append(
            Gpu(
                index=index,
                name=gpu.name,
                memory_bytes=gpu.total_memory,
                capability=(gpu.major, gpu.minor),
                free_bytes=torch.cuda.mem_get_info(index)[0],
                pcie=_pcie_link(_pci_address(gpu)),
                peers=tuple(
                    other
                    for other in range(count)
                    if other != index and torch.cuda.can_device_access_peer(index, other)
                ),
                memory_bytes_per_s=2 * clock * 1e3 * bus / 8 or None,
            )
        )
    return tuple(found)


def _pci_address(gpu: object) -> str:
    """A GPU's address as /sys/bus/pci writes it; empty where torch does not tell."""
    numbers = [getattr(gpu, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    domain, bus, device = (number if isinstance(number, int) else -1 for number in numbers)
    return "" if min(domain, bus, device) < 0 else f"{domain:04x}:{bus:02x}:{device:02x}.0"


# Gigatransfers per second of a lane -> PCI Express generation.
_PCIE_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}


def _pcie_link(address: str, root: Path = Path("/sys/bus/pci/devices")) -> PcieLink | None:
    """The link at `address` at its best: idle GPUs fall back to slower generations."""
    if not address:
        return None
    gpu = (root / address).resolve()  # its folder is in that of the port above, whose speed is the slot's
    speeds = [_read(at / "max_link_speed").partition(" ")[0] for at in (gpu, gpu.parent)]
    width = _read(root / address / "current_link_width").strip()
    generation = min((_PCIE_GENERATIONS[speed] for speed in speeds if speed in _PCIE_GENERATIONS), default=0)
    return PcieLink(generation, int(width)) if generation and width.isdecimal() else None


def _huge_pages(sys: Path = Path("/sys/kernel/mm"), proc: Path = Path("/proc")) -> HugePages:
    chosen = _read(sys / "transparent_hugepage" / "enabled").partition("[")[2].partition("]")[0]
    pairs = (line.partition(":")[::2] for line in _read(proc / "meminfo").splitlines())
    kilobytes = {key: int(rest.split()[0]) for key, rest in pairs if rest.split()[:1]}
    return HugePages(chosen, 1024 * kilobytes.get("Hugetlb", 0))


def _disks(root: Path = Path("/sys/block")) -> tuple[Disk, ...]:
    """Drives that could hold a model: no loop devices, RAM disks or empty drives."""
    found = []
    for folder in sorted(root.glob("*")):
        sectors = _read(folder / "size").strip()
        nbytes = int(sectors) * 512 if sectors.isdecimal() else 0
        if nbytes == 0 or folder.name.startswith(("loop", "ram", "zram", "sr", "fd")):
            continue
        model = _read(folder / "device" / "model").strip()
        # Virtual drives claim to rotate, whatever is behind them.
        is_virtual = folder.name.startswith(("vd", "xvd"))
        rotational = not is_virtual and _read(folder / "queue" / "rotational").strip() == "1"
        found.append(Disk(folder.name, model, nbytes, rotational))
    return tuple(found)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
