"""Machines built of parts: what fits into what, what it costs, and what the planner sees of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from memory.hardware.detect import PcieLink
from memory.hardware.limits import dram_peak
from memory.hardware.profiles import GIB, ROWS_PER_CORE, GpuSpec, HardwareProfile, MachineCosts
from memory.planner.parts import Dimm, DiskPart, Gpu, Part, Parts, Platform, Power

RESERVED_DRAM_GIB = 6  # the system and its page cache, as in the shipped profiles
RESERVED_VRAM_GIB = 0.7  # driver and screen
FREE_OF_DISK = 0.9
GPU_IDLE_WATTS = 20
# Cards and processor wait for memory and for each other: of their limits, what they draw meanwhile. Assumed.
BUSY_SHARE = 0.6
# A supply must stand all limits at once.
SUPPLY_SHARE = 0.9
KINDS_OF_GPUS = 2  # in one machine, at most


@dataclass(frozen=True)
class Machine:
    """A choice of parts: `modules` of one kind in the channels, GPUs in the platform's slots."""

    platform: Platform
    gpus: tuple[Gpu, ...]
    dimm: Dimm
    modules: int
    disk: DiskPart
    power: Power

    def counted(self) -> list[tuple[Part, int]]:
        """The parts, and how many of each."""
        gpus = Counter(self.gpus)
        return [
            *gpus.items(), (self.platform, 1), (self.dimm, self.modules), (self.disk, 1), (self.power, 1),
        ]  # fmt: skip

    @property
    def price(self) -> float:
        """Of all parts that are not owned already."""
        return sum(part.cost(count) for part, count in self.counted())

    @property
    def dram_gib(self) -> float:
        """Built in."""
        return self.modules * self.dimm.gib

    @property
    def dram_bytes_per_s(self) -> float:
        """Plain reads."""
        return dram_rate(self.platform, self.dimm, self.modules)

    def profile(self, name: str, currency: str) -> HardwareProfile:
        """The machine as the planner sees it."""
        p = self.platform
        drawn = p.watts + self.disk.watts + sum(gpu.watts for gpu in self.gpus)
        return HardwareProfile(
            name=name,
            description=self.description,
            cores=p.cores,
            cpu_level=p.level,
            cpu_matmul_flops=p.matmul_gflops * 1e9,
            expert_bytes_per_s=None,
            dram_bytes=int((self.dram_gib - RESERVED_DRAM_GIB) * GIB),
            dram_bytes_per_s=self.dram_bytes_per_s,
            dram_rows_per_s=p.cores * ROWS_PER_CORE,
            disk_bytes=int(FREE_OF_DISK * self.disk.gb * 1e9),
            disk_bytes_per_s=min(
                self.disk.read_gb_per_s * 1e9, _slower(self.disk.pcie, p.disk_link).peak_bytes_per_s
            ),
            disk_reads_per_s=self.disk.random_reads_per_s,
            gpus=tuple(self._gpu(n, gpu) for n, gpu in enumerate(self.gpus)),
            costs=MachineCosts(
                self.price,
                p.idle_watts + self.disk.watts + GPU_IDLE_WATTS * len(self.gpus),
                p.idle_watts + BUSY_SHARE * (drawn - p.idle_watts),
                currency,
                f"a list of parts; watts assumed: {BUSY_SHARE:.0%} of the parts' limits while computing",
            ),
        )

    def _gpu(self, number: int, gpu: Gpu) -> GpuSpec:
        link = _slower(gpu.pcie, self.platform.gpu_links[len(self.gpus) - 1][number]).usable_bytes_per_s
        return GpuSpec(
            name=gpu.name,
            kind="cuda",
            memory_bytes=int((gpu.memory_gib - RESERVED_VRAM_GIB) * GIB),
            memory_bytes_per_s=gpu.memory_gb_per_s * 1e9,
            matmul_flops=gpu.matmul_tflops * 1e12,
            link_bytes_per_s=link,
            link_together_bytes_per_s=link,
        )

    @property
    def description(self) -> str:
        """In a line."""
        gpus = " + ".join(f"{count} x {gpu.name}" for gpu, count in Counter(self.gpus).items()) or "no GPU"
        return f"{gpus}; {self.platform.name}; {self.modules} x {self.dimm.name}; {self.disk.name}"


def dram_rate(platform: Platform, dimm: Dimm, modules: int) -> float:
    """What plain reads reach with so many modules, in bytes a second."""
    each = -(-modules // platform.channels)
    speed = min(dimm.mt_per_s, platform.mt_per_s[each - 1])
    return dram_peak(min(modules, platform.channels), speed) * platform.dram_share


def gpu_choices(parts: Parts, platform: Platform) -> Iterator[tuple[Gpu, ...]]:
    """Cards that a platform has slots for, of one kind or of two; none, too."""
    slots = len(platform.gpu_links)
    yield ()
    for gpu in parts.gpus:
        for count in range(1, slots + 1):
            yield (gpu,) * count
    for one, other in combinations(parts.gpus, KINDS_OF_GPUS):
        for ones in range(1, slots):
            for others in range(1, slots - ones + 1):
                yield (one,) * ones + (other,) * others


def memory_choices(parts: Parts, platform: Platform) -> Iterator[tuple[Dimm, int]]:
    """Modules of one kind: in half of the channels, in all, or more in each, as far as a board takes them."""
    counts = {platform.channels * each for each in range(1, len(platform.mt_per_s) + 1)}
    if platform.channels % 2 == 0:
        counts.add(platform.channels // 2)
    for dimm in parts.dimms:
        if dimm.kind != platform.memory:
            continue
        for count in sorted(counts):
            if RESERVED_DRAM_GIB < count * dimm.gib <= platform.most_gib:
                yield dimm, count


def power_for(parts: Parts, platform: Platform, gpus: tuple[Gpu, ...], disk: DiskPart) -> Power | None:
    """The cheapest supply that stands all limits at once; None where none does."""
    drawn = platform.watts + disk.watts + sum(gpu.watts for gpu in gpus)
    enough = [power for power in parts.powers if SUPPLY_SHARE * power.watts >= drawn]
    return min(enough, key=lambda power: (power.cost(), power.watts), default=None)


def _slower(one: PcieLink, other: PcieLink) -> PcieLink:
    """What two ends of a link agree on."""
    return PcieLink(min(one.generation, other.generation), min(one.lanes, other.lanes))
