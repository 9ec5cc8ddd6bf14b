"""Buying advice: what fits into what, and that the search finds what trying everything finds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from engine.families.released import released_shape
from memory.hardware.detect import PcieLink
from memory.planner.advice import KEPT, Adviser
from memory.planner.cost_model import CostModel
from memory.planner.machines import Machine, gpu_choices, memory_choices, power_for
from memory.planner.parts import Parts, load_parts
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.price_files import shipped_text
from memory.planner.routing import SKEWED
from quant.errors import ConfigError

FLASH = released_shape("deepseek-v4-flash")
WORK = Workload(8192, 4)
ALL = load_parts(None)
# Two kinds of cards, two platforms: few enough to try everything.
FEW = replace(ALL, gpus=ALL.gpus[:2], platforms=ALL.platforms[:2])


def everything(parts: Parts) -> list[Machine]:
    return [
        Machine(platform, gpus, dimm, modules, disk, power)
        for platform in parts.platforms
        for gpus in gpu_choices(parts, platform)
        for dimm, modules in memory_choices(parts, platform)
        for disk in parts.disks
        if (power := power_for(parts, platform, gpus, disk)) is not None
    ]


def speed(machine: Machine) -> float:
    profile = machine.profile("x", "USD")
    placement = plan(FLASH, profile, WORK)
    if not placement.fits:
        return 0.0
    return CostModel(FLASH, profile, placement, SKEWED).decode(1, 4096).tokens_per_s


def test_what_is_built_fits_together() -> None:
    machines = everything(ALL)
    assert len(machines) > 500
    for machine in machines:
        platform = machine.platform
        assert len(machine.gpus) <= len(platform.gpu_links)
        assert len(set(machine.gpus)) <= 2
        assert machine.dimm.kind == platform.memory
        assert machine.modules <= platform.channels * len(platform.mt_per_s)
        assert machine.dram_gib <= platform.most_gib
        limits = platform.watts + machine.disk.watts + sum(gpu.watts for gpu in machine.gpus)
        assert limits <= 0.9 * machine.power.watts
    profile = next(m for m in machines if m.modules == 4 and len(m.gpus) == 2).profile("x", "USD")
    # Two cards on a desktop board share its lanes, and cards of PCIe 4.0 stay at that.
    assert profile.gpus[0].name == "RTX 3090"
    assert profile.gpus[0].link_bytes_per_s == PcieLink(4, 8).usable_bytes_per_s
    # Four modules on two channels run at 5200: 2 x 8 x 5.2 GB/s, of which 83 % are reached.
    assert profile.dram_bytes_per_s == pytest.approx(83.2e9 * 0.83)
    assert profile.costs is not None


def test_the_search_finds_what_trying_everything_finds() -> None:
    speeds = {machine: speed(machine) for machine in everything(FEW)}
    adviser = Adviser(FLASH, FEW, WORK, SKEWED)
    for budget in (2500, 3000, 4000, 6000):
        affordable = {m: s for m, s in speeds.items() if m.price <= budget and s > 0}
        found = adviser.best(budget)
        fastest = max(affordable.values())
        assert found[0].alone * 1.01 >= fastest
        assert found[0].price == min(m.price for m, s in affordable.items() if s * 1.01 >= fastest)
        assert all(each.price <= budget for each in found)
        bodies = Counter((each.machine.platform.name, each.machine.gpus) for each in found)
        assert max(bodies.values()) == 1  # runners-up differ in more than a module
        assert len(found) <= KEPT


def test_the_search_looks_closely_at_few_of_many() -> None:
    adviser = Adviser(FLASH, ALL, WORK, SKEWED)
    found = adviser.best(5000)
    assert found
    assert adviser.planned < sum(machine.price <= 5000 for machine in everything(ALL)) / 2
    before = adviser.planned
    assert adviser.best(5000) == found
    assert adviser.planned - before < before  # only bounds are planned again


def test_what_is_owned_costs_nothing_and_more_money_is_never_worse() -> None:
    adviser = Adviser(FLASH, FEW.owning({"RTX 4090": 2}), WORK, SKEWED)
    best = [adviser.best(budget)[0] for budget in (2500, 3000, 4000)]
    for cheaper, dearer in pairwise(best):
        assert dearer.alone * 1.01 >= cheaper.alone
    counted = {part.name: (count, part.cost(count)) for part, count in best[1].machine.counted()}
    assert counted["RTX 4090"] == (2, 0.0)
    assert ALL.gpus[1].cost(1) == ALL.gpus[1].price


def test_nothing_is_found_where_nothing_fits() -> None:
    assert Adviser(FLASH, ALL, WORK, SKEWED).best(1000) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("price = 850", "price = -850", "gpu.0.price: Input should be greater than or equal to 0"),
        ('pcie = "4.0 x16"', 'pcie = "fast"', "gpu.0.pcie: 'fast' is not a PCI Express link"),
        ('name = "RTX 4090"', 'name = "RTX 3090"', "two parts are called 'RTX 3090'"),
        ('memory = "DDR5 UDIMM"', 'memory = "DDR6"', "takes 'DDR6', but no module is of that kind"),
        ('[["5.0 x16"], [', '[["5.0 x16", "5.0 x16"], [', "gpu_links for 1 card(s) are 2"),
        ("read_gb_per_s = 7\n", "read_gb_per_s = 9\n", "a disk of 9 GB/s is impossible: PCIe 4.0 x4"),
        ("watts = 350", "watt = 350", "gpu.0.watts: missing; gpu.0.watt: no such key"),
    ],
)
def test_a_wrong_list_of_parts_is_refused_in_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    file = tmp_path / "parts.toml"
    text = shipped_text("parts.toml")
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as refused:
        load_parts(file)
    assert says in str(refused.value)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ConfigError, match="no part is called 'RTX 9999'; known: RTX 3090; RTX 4090"):
        ALL.owning({"RTX 9999": 1})


def test_shipped_parts_are_dated_sourced_and_marked_as_not_verified() -> None:
    for part in ALL.all():
        assert part.checked <= "2026-11-29"
        assert part.source
        assert not part.is_verified
        assert part.owned == 0
