"""Hardware profiles: what a machine has to offer, for planning before anything is loaded or bought.

A profile is one of those shipped in `memory/hardware/shipped/`, a TOML file of the same form, or this machine
(`memory/hardware/this_machine.py`). All rates are usable ones, as a program measures them, except a GPU's
memory bandwidth and arithmetic, which are the data sheet's.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from memory.hardware.detect import PcieLink
from memory.hardware.limits import check_disk, check_dram, check_link, pcie_link
from memory.toml_files import Section, parse_toml, read_toml
from quant.errors import ConfigError

GIB = 1 << 30
CUDA_PAGE = 2 << 20  # the smallest piece that NVIDIA's driver maps


@dataclass(frozen=True)
class GpuSpec:
    """A GPU.

    kind                        `cuda`, or `virtual`: host memory that stands in, computed on by the CPU
    memory_bytes                what may be allocated
    memory_bytes_per_s          bandwidth of its memory
    matmul_flops                dense bf16 arithmetic per second
    link_bytes_per_s            from host memory, when only this GPU's link is busy
    link_together_bytes_per_s   the same while all GPUs' links are busy
    page_bytes                  in which KV takes its memory
    """

    name: str
    kind: str
    memory_bytes: int
    memory_bytes_per_s: float
    matmul_flops: float
    link_bytes_per_s: float
    link_together_bytes_per_s: float
    page_bytes: int = CUDA_PAGE


@dataclass(frozen=True)
class MachineCosts:
    """What a machine costs to buy, and draws at the wall; `source` says where the figures are from."""

    price: float
    idle_watts: float
    busy_watts: float
    currency: str
    source: str


@dataclass(frozen=True)
class HardwareProfile:
    """A machine as the planner sees it; bytes are what models may use, not what is built in.

    cpu_level            instruction set of the native kernels: `portable`, `avx2` or `avx512`
    cpu_matmul_flops     what the native kernels reach on many tokens, all cores
    cpu_fp8_flops        the same with weights in FP8, as dense ones are; None: alike
    rearranged_per_core  bytes a second that a core brings into the kernels' order; None: not measured
    expert_bytes_per_s   at which the CPU's kernels get through experts, one token; None: not measured
    dram_rows_per_s      random Engram rows gathered from DRAM
    disk_bytes_per_s     direct sequential reads;  disk_reads_per_s  random reads of 4 KiB, deep queue
    assumed              what in here is neither measured nor stated by a person, for the plan to say
    costs                None: not known
    """

    name: str
    description: str
    cores: int
    cpu_level: str
    cpu_matmul_flops: float
    expert_bytes_per_s: float | None
    dram_bytes: int
    dram_bytes_per_s: float
    dram_rows_per_s: float
    disk_bytes: int
    disk_bytes_per_s: float
    disk_reads_per_s: float
    gpus: tuple[GpuSpec, ...] = ()
    assumed: tuple[str, ...] = ()
    costs: MachineCosts | None = None
    cpu_fp8_flops: float | None = None
    rearranged_per_core: float | None = None

    def with_devices(self, devices: tuple[DeviceSpec, ...]) -> HardwareProfile:
        """This machine with these GPUs alone, each as large as its budget.

        Real ones are the profile's, in its order. Virtual ones take their memory from DRAM, and the CPU
        computes for them. Raises ConfigError where the profile has no such GPU, or a smaller one.
        """
        real = sum(device.kind == "cuda" for device in devices)
        gpus = tuple(
            self._gpu(device, is_alone=real == 1)
            if device.kind == "cuda"
            else virtual_gpu(self, device.budget_bytes, device.link_bytes_per_s)
            for device in devices
        )
        taken = sum(gpu.memory_bytes for gpu in gpus if gpu.kind == "virtual")
        return replace(self, gpus=gpus, dram_bytes=max(0, self.dram_bytes - taken))

    def _gpu(self, device: DeviceSpec, *, is_alone: bool) -> GpuSpec:
        gpus = [gpu for gpu in self.gpus if gpu.kind == "cuda"]
        if device.index >= len(gpus):
            raise ConfigError(f"devices: there is no GPU {device.index} in {self.name}; it has {len(gpus)}")
        gpu = gpus[device.index]
        if device.budget_bytes > gpu.memory_bytes:
            raise ConfigError(
                f"devices: GPU {device.index} of {self.name} has {gpu.memory_bytes / 1e9:.1f} GB for "
                f"models, but {device.budget_bytes / 1e9:.1f} GB was requested"
            )
        together = gpu.link_bytes_per_s if is_alone else gpu.link_together_bytes_per_s
        return replace(gpu, memory_bytes=device.budget_bytes, link_together_bytes_per_s=together)


def virtual_gpu(machine: HardwareProfile, nbytes: int, link_bytes_per_s: float | None) -> GpuSpec:
    """A GPU that is host memory of `machine`, computed on by its CPU; its link as fast as copies go, unless
    given."""
    link = link_bytes_per_s or machine.dram_bytes_per_s
    return GpuSpec(
        name="virtual",
        kind="virtual",
        memory_bytes=nbytes,
        memory_bytes_per_s=machine.dram_bytes_per_s,
        matmul_flops=machine.cpu_matmul_flops,
        link_bytes_per_s=link,
        link_together_bytes_per_s=link,
        page_bytes=mmap.PAGESIZE,
    )


@dataclass(frozen=True)
class DeviceSpec:
    """One device of `--devices`: `link_bytes_per_s` None means as fast as copies go."""

    kind: str
    index: int
    budget_bytes: int
    link_bytes_per_s: float | None


_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_devices(text: str) -> tuple[DeviceSpec, ...]:
    """Devices from `virtual:24GiB@12.5GB/s,cuda:20GiB`: kind, budget, and the link's speed or none.

    Raises ConfigError naming the part that is wrong.
    """
    found: list[DeviceSpec] = []
    for part in text.split(","):
        kind, colon, rest = part.strip().partition(":")
        size, at, speed = rest.partition("@")
        if kind not in ("virtual", "cuda") or not colon:
            raise ConfigError(
                f"devices: {part.strip()!r} is not a device; expected something like virtual:24GiB@12.5GB/s"
            )
        if at and kind == "cuda":
            raise ConfigError(f"devices: {part.strip()!r}: the link speed of a real GPU cannot be set")
        if at and not speed.endswith("/s"):
            raise ConfigError(f"devices: {speed!r} is not a speed; expected something like 12.5GB/s")
        index = sum(device.kind == kind for device in found)
        link = parse_bytes(speed.removesuffix("/s")) if at else None
        try:
            found.append(DeviceSpec(kind, index, parse_bytes(size), link))
        except ConfigError as error:
            raise ConfigError(
                f"devices: {part.strip()!r}: {error}; a device is a kind and a budget, like {kind}:20GiB; "
                "GPUs are used in order"
            ) from None
    return tuple(found)


def parse_bytes(text: str) -> int:
    """Bytes from `24GiB`, `12.5 GB` or `4096`. Raises ConfigError."""
    text = text.strip()
    number = text.rstrip("BbKkMmGgTtIi ")
    unit = text[len(number) :].strip().upper()
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"{text!r} is not a size; expected something like 24GiB or 12.5GB") from None
    if not 1 <= value < 1 << 60:
        raise ConfigError(f"{text!r} is not a plausible size")
    return int(value)


def written(nbytes: int) -> str:
    """So many bytes, or a little more, as settings take them."""
    return f"{-(-nbytes // 2**20)}MiB" if nbytes < 2**33 else f"{-(-nbytes // 2**30)}GiB"


_Positive = Annotated[float, Field(gt=0, lt=1e9)]
_Rate = Annotated[float, Field(gt=0, lt=1e15)]
_Share = Annotated[float, Field(ge=0, lt=1e9)]


def _is_pcie(text: str) -> str:
    pcie_link(text)
    return text


# A PCI Express link, such as `4.0 x8`; refused where it is none.
Pcie = Annotated[str, AfterValidator(_is_pcie)]


class _Cpu(Section):
    cores: Annotated[int, Field(gt=0, lt=100_000)]
    level: Annotated[str, Field(pattern="^(portable|avx2|avx512)$")]
    matmul_gflops: _Positive
    expert_gb_per_s: _Positive | None = None
    fp8_gflops: _Positive | None = None
    rearranged_gb_per_s: _Positive | None = None


class _Dram(Section):
    size_gib: _Positive
    reserved_gib: _Share = 0.0
    read_gb_per_s: _Positive
    random_rows_per_s: _Rate | None = None
    channels: Annotated[int, Field(gt=0, lt=100)] | None = None
    mt_per_s: _Positive | None = None


class _Disk(Section):
    free_gb: _Positive
    read_gb_per_s: _Positive
    random_reads_per_s: _Rate
    pcie: Pcie | None = None


class _Gpu(Section):
    name: str
    memory_gib: _Positive
    reserved_gib: _Share = 0.0
    memory_gb_per_s: _Positive
    matmul_tflops: _Positive
    link_gb_per_s: _Positive
    link_together_gb_per_s: _Positive | None = None
    pcie: Pcie | None = None


class _Costs(Section):
    price: _Share
    idle_watts: _Positive
    busy_watts: _Positive
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "USD"
    source: str


class _File(Section):
    name: str
    description: str = ""
    costs: _Costs | None = None
    cpu: _Cpu
    dram: _Dram
    disk: _Disk
    gpu: list[_Gpu] = Field(default_factory=list)


PAGE = "docs/planner.md"  # shows a profile
# Engram rows that a core gathers and turns into numbers, where `random_rows_per_s` is not given: half of
# what one core was measured at, since rows of large tables also miss the address cache.
ROWS_PER_CORE = 5e5


def shipped() -> tuple[str, ...]:
    """Names of the profiles that come with Loci."""
    folder = files("memory.hardware") / "shipped"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir()))


def load_profile(name: str) -> HardwareProfile:
    """A shipped profile by name, or one from a TOML file. Raises ConfigError."""
    if name in shipped():
        return parse_profile((files("memory.hardware") / "shipped" / f"{name}.toml").read_text(), name)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"{name}: unknown hardware profile; expected one of {', '.join(shipped())}, `this` for this "
            f"machine, or a TOML file ({PAGE})"
        )
    return _checked(read_toml(_File, path, PAGE), name)


def parse_profile(text: str, source: str) -> HardwareProfile:
    """A profile from TOML text. Raises ConfigError naming every key that is unknown, missing or wrong, or a
    rate that no such machine has."""
    return _checked(parse_toml(_File, text, source, PAGE), source)


def _checked(f: _File, source: str) -> HardwareProfile:
    for section, size, reserved in (
        ("dram", f.dram.size_gib, f.dram.reserved_gib),
        *((f"gpu.{i}", gpu.memory_gib, gpu.reserved_gib) for i, gpu in enumerate(f.gpu)),
    ):
        if reserved >= size:
            raise ConfigError(
                f"{source}: {section}: {reserved} GiB of {size} GiB is reserved, which leaves nothing"
            )
    check_dram(f"{source}: dram", f.dram.read_gb_per_s * 1e9, f.dram.channels, f.dram.mt_per_s)
    disk = f.disk
    check_disk(f"{source}: disk", disk.read_gb_per_s * 1e9, disk.random_reads_per_s, _link(disk.pcie))
    for i, gpu in enumerate(f.gpu):
        check_link(f"{source}: gpu.{i}", gpu.link_gb_per_s * 1e9, _link(gpu.pcie))
    return _profile(f)


def _link(text: str | None) -> PcieLink | None:
    return None if text is None else pcie_link(text)


def _profile(f: _File) -> HardwareProfile:
    gpus = tuple(
        GpuSpec(
            name=gpu.name,
            kind="cuda",
            memory_bytes=int((gpu.memory_gib - gpu.reserved_gib) * GIB),
            memory_bytes_per_s=gpu.memory_gb_per_s * 1e9,
            matmul_flops=gpu.matmul_tflops * 1e12,
            link_bytes_per_s=gpu.link_gb_per_s * 1e9,
            link_together_bytes_per_s=min(gpu.link_together_gb_per_s or 1e9, gpu.link_gb_per_s) * 1e9,
        )
        for gpu in f.gpu
    )
    return HardwareProfile(
        name=f.name,
        description=f.description,
        cores=f.cpu.cores,
        cpu_level=f.cpu.level,
        cpu_matmul_flops=f.cpu.matmul_gflops * 1e9,
        expert_bytes_per_s=f.cpu.expert_gb_per_s * 1e9 if f.cpu.expert_gb_per_s else None,
        cpu_fp8_flops=f.cpu.fp8_gflops * 1e9 if f.cpu.fp8_gflops else None,
        rearranged_per_core=f.cpu.rearranged_gb_per_s * 1e9 if f.cpu.rearranged_gb_per_s else None,
        dram_bytes=int((f.dram.size_gib - f.dram.reserved_gib) * GIB),
        dram_bytes_per_s=f.dram.read_gb_per_s * 1e9,
        dram_rows_per_s=f.dram.random_rows_per_s or f.cpu.cores * ROWS_PER_CORE,
        disk_bytes=int(f.disk.free_gb * 1e9),
        disk_bytes_per_s=f.disk.read_gb_per_s * 1e9,
        disk_reads_per_s=f.disk.random_reads_per_s,
        gpus=gpus,
        costs=None if f.costs is None else MachineCosts(**dict(f.costs)),
    )
