"""Lists of parts that machines can be built of, from a TOML file that its owner edits: docs/economics.md."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from memory.hardware.detect import PcieLink
from memory.hardware.limits import check_disk, pcie_link
from memory.hardware.profiles import Pcie
from memory.planner.price_files import PAGE, Amount, Currency, Positive, shipped_text
from memory.toml_files import Section, parse_toml, read_toml
from quant.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """Something to buy, such as all parts are.

    owned    so many cost nothing
    checked  the day that the price is from;  source  where it is from;  is_verified  False: to be checked
    """

    name: str
    price: float
    checked: str
    source: str
    is_verified: bool
    owned: int

    def cost(self, count: int = 1) -> float:
        """What so many cost beyond those that are owned."""
        return self.price * max(0, count - self.owned)


Kind = TypeVar("Kind", bound=Part)


@dataclass(frozen=True)
class Gpu(Part):
    """A graphics card; `watts` at its limit."""

    memory_gib: float
    memory_gb_per_s: float
    matmul_tflops: float
    pcie: PcieLink
    watts: float


@dataclass(frozen=True)
class Platform(Part):
    """Processor, board, cooler and case.

    memory      the kind of modules; `mt_per_s` of the memory with one of them in each channel, with two, ...
    dram_share  of its channels' rate, what plain reads reach
    gpu_links   links of the cards, where there is one, where there are two, ...
    disk_link   of the drive
    """

    cores: int
    level: str
    matmul_gflops: float
    memory: str
    channels: int
    mt_per_s: tuple[float, ...]
    dram_share: float
    most_gib: float
    gpu_links: tuple[tuple[PcieLink, ...], ...]
    disk_link: PcieLink
    watts: float
    idle_watts: float


@dataclass(frozen=True)
class Dimm(Part):
    """A memory module."""

    kind: str
    gib: float
    mt_per_s: float


@dataclass(frozen=True)
class DiskPart(Part):
    """A drive."""

    gb: float
    read_gb_per_s: float
    random_reads_per_s: float
    pcie: PcieLink
    watts: float


@dataclass(frozen=True)
class Power(Part):
    """A power supply."""

    watts: float


@dataclass(frozen=True)
class Parts:
    """All that can be bought."""

    currency: str
    gpus: tuple[Gpu, ...]
    platforms: tuple[Platform, ...]
    dimms: tuple[Dimm, ...]
    disks: tuple[DiskPart, ...]
    powers: tuple[Power, ...]

    def all(self) -> tuple[Part, ...]:
        """Every part."""
        return (*self.gpus, *self.platforms, *self.dimms, *self.disks, *self.powers)

    def owning(self, counts: Mapping[str, int]) -> Parts:
        """The same, where so many of some parts are there already. Raises ConfigError for unknown ones."""
        names = [part.name for part in self.all()]
        for name in counts:
            if name not in names:
                raise ConfigError(f"no part is called {name!r}; known: {'; '.join(names)}")

        def mine(parts: tuple[Kind, ...]) -> tuple[Kind, ...]:
            return tuple(replace(p, owned=counts.get(p.name, p.owned)) for p in parts)

        return replace(
            self, gpus=mine(self.gpus), platforms=mine(self.platforms), dimms=mine(self.dimms),
            disks=mine(self.disks), powers=mine(self.powers),
        )  # fmt: skip


class _Part(Section):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    price: Amount
    checked: datetime.date
    source: str
    verified: bool = False
    owned: Annotated[int, Field(ge=0, le=1000)] = 0


class _Gpu(_Part):
    memory_gib: Positive
    memory_gb_per_s: Positive
    matmul_tflops: Positive
    pcie: Pcie
    watts: Positive


class _Platform(_Part):
    cores: Annotated[int, Field(gt=0, lt=10_000)]
    level: Annotated[str, Field(pattern="^(portable|avx2|avx512)$")]
    matmul_gflops: Positive
    memory: str
    channels: Annotated[int, Field(gt=0, le=64)]
    mt_per_s: Annotated[list[Positive], Field(min_length=1, max_length=4)]
    dram_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    most_gib: Positive
    gpu_links: Annotated[list[list[Pcie]], Field(max_length=16)] = Field(default_factory=list)
    disk_link: Pcie
    watts: Positive
    idle_watts: Positive


class _Dimm(_Part):
    kind: str
    gib: Positive
    mt_per_s: Positive


class _Disk(_Part):
    gb: Positive
    read_gb_per_s: Positive
    random_reads_per_s: Positive
    pcie: Pcie
    watts: Positive


class _Power(_Part):
    watts: Positive


class _File(Section):
    currency: Currency
    gpu: list[_Gpu] = Field(default_factory=list)
    platform: Annotated[list[_Platform], Field(min_length=1)]
    dimm: Annotated[list[_Dimm], Field(min_length=1)]
    disk: Annotated[list[_Disk], Field(min_length=1)]
    power: Annotated[list[_Power], Field(min_length=1)]


def load_parts(path: Path | None) -> Parts:
    """A list of parts; None: the example that comes with Loci. Raises ConfigError naming what is wrong."""
    if path is None:
        source = "the shipped parts.toml"
        found = parse_toml(_File, shipped_text("parts.toml"), source, PAGE)
    else:
        source = str(path)
        found = read_toml(_File, path, PAGE)
    parts = Parts(
        currency=found.currency,
        gpus=tuple(Gpu(**_fields(p) | {"pcie": pcie_link(p.pcie)}) for p in found.gpu),
        platforms=tuple(_platform(p) for p in found.platform),
        dimms=tuple(Dimm(**_fields(p)) for p in found.dimm),
        disks=tuple(DiskPart(**_fields(p) | {"pcie": pcie_link(p.pcie)}) for p in found.disk),
        powers=tuple(Power(**_fields(p)) for p in found.power),
    )
    _check(parts, source)
    return parts


def _fields(part: _Part) -> dict[str, Any]:
    fields = dict(part)
    return fields | {"checked": part.checked.isoformat(), "is_verified": fields.pop("verified")}


def _platform(p: _Platform) -> Platform:
    links = tuple(tuple(pcie_link(link) for link in links) for links in p.gpu_links)
    changed = {"gpu_links": links, "disk_link": pcie_link(p.disk_link), "mt_per_s": tuple(p.mt_per_s)}
    return Platform(**_fields(p) | changed)


def _check(parts: Parts, source: str) -> None:
    """What no single entry can say. Raises ConfigError."""
    seen: set[str] = set()
    for part in parts.all():
        if part.name in seen:
            raise ConfigError(f"{source}: two parts are called {part.name!r}")
        seen.add(part.name)
    kinds = {dimm.kind for dimm in parts.dimms}
    for platform in parts.platforms:
        if platform.memory not in kinds:
            raise ConfigError(
                f"{source}: {platform.name!r} takes {platform.memory!r}, but no module is of that kind; "
                f"there are {', '.join(sorted(kinds))}"
            )
        for count, links in enumerate(platform.gpu_links, 1):
            if len(links) != count:
                raise ConfigError(
                    f"{source}: {platform.name!r}: gpu_links for {count} card(s) are {len(links)}"
                )
    for disk in parts.disks:
        where = f"{source}: {disk.name!r}"
        check_disk(where, disk.read_gb_per_s * 1e9, disk.random_reads_per_s, disk.pcie)
