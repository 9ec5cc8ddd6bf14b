"""Which machine of listed parts gives the most tokens a second for a budget, by the planner itself.

A search over platforms and cards, most promising first: what a platform with these cards could reach with
the best memory and drive that the budget leaves is a bound, and what cannot beat the machines already found
by it is not looked at more closely. All that is left is planned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memory.planner.cost_model import CostModel
from memory.planner.machines import Machine, dram_rate, gpu_choices, memory_choices, power_for
from memory.planner.parts import Dimm, DiskPart, Gpu, Parts, Platform, Power
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.routing import Routing
from memory.planner.shape import ModelShape

KEPT = 4  # the best, and runners-up
ALIKE = 1.01  # within this factor of speed, the cheaper machine is the better one
LOOSE = (
    1.02  # bounds are rounded up by this: a plan with more of everything is not always faster to the last bit
)


@dataclass(frozen=True)
class Advice:
    """A machine, and tokens a second with one answer at a time and with all of the workload's."""

    machine: Machine
    alone: float
    together: float

    @property
    def price(self) -> float:
        """Of what is to be bought."""
        return self.machine.price


@dataclass(frozen=True)
class _Body:
    """A platform with cards, and what memory and drives it can have within the budget."""

    platform: Platform
    gpus: tuple[Gpu, ...]
    rest: tuple[tuple[Dimm, int, DiskPart, Power], ...]


@dataclass
class Adviser:
    """Searches machines for a model. Speeds are kept, so a second search with another budget is quick.

    is_together  what counts is all answers of the workload together, not one alone
    planned      machines that were planned so far
    """

    shape: ModelShape
    parts: Parts
    workload: Workload
    routing: Routing
    is_together: bool = False
    planned: int = 0
    _speeds: dict[Machine, tuple[float, float]] = field(default_factory=dict)

    def best(self, budget: float, on_progress: Callable[[int, int], None] | None = None) -> list[Advice]:
        """The best machine that the budget pays, and runners-up with other cards or another platform, best
        first; none where nothing that it pays can hold the model."""
        bodies = [body for body in self._bodies(budget) if body.rest]
        bounds = []
        for number, body in enumerate(bodies):
            bounds.append((LOOSE * self._bound(body), number))
            if on_progress is not None:
                on_progress(number + 1, 2 * len(bodies))
        found: list[Advice] = []
        for at, (bound, number) in enumerate(sorted(bounds, reverse=True)):
            if on_progress is not None:
                on_progress(len(bodies) + at + 1, 2 * len(bodies))
            if len(found) == KEPT and bound < self._counts(found[-1]) / ALIKE:
                break
            best = self._best_of(bodies[number])
            if best is not None:
                found = self._ranked([*found, best])[:KEPT]
        return found

    def _bodies(self, budget: float) -> list[_Body]:
        bodies = []
        for platform in self.parts.platforms:
            choices = list(memory_choices(self.parts, platform))
            for gpus in gpu_choices(self.parts, platform):
                rest = []
                for disk in self.parts.disks:
                    power = power_for(self.parts, platform, gpus, disk)
                    if power is None:
                        continue
                    for dimm, modules in choices:
                        if Machine(platform, gpus, dimm, modules, disk, power).price <= budget:
                            rest.append((dimm, modules, disk, power))
                bodies.append(_Body(platform, gpus, tuple(rest)))
        return bodies

    def _bound(self, body: _Body) -> float:
        """What this body could reach at most: as if its memory were the largest, the fastest and its drive
        the fastest that the budget pays, all at once."""
        first = body.rest[0]
        most_gib = max(dimm.gib * modules for dimm, modules, _, _ in body.rest)
        fastest = max(dram_rate(body.platform, dimm, modules) for dimm, modules, _, _ in body.rest)
        drives = [
            Machine(body.platform, body.gpus, *first[:2], disk, first[3]) for _, _, disk, _ in body.rest
        ]
        profiles = [machine.profile("bound", self.parts.currency) for machine in drives]
        profile = replace(
            profiles[0],
            dram_bytes=int(most_gib * 2**30),
            dram_bytes_per_s=fastest,
            disk_bytes=max(p.disk_bytes for p in profiles),
            disk_bytes_per_s=max(p.disk_bytes_per_s for p in profiles),
            disk_reads_per_s=max(p.disk_reads_per_s for p in profiles),
        )
        placement = plan(self.shape, profile, self.workload)
        self.planned += 1
        if not placement.fits:
            return 0.0
        costs = CostModel(self.shape, profile, placement, self.routing)
        return costs.decode(self._sequences, self.workload.context // 2).tokens_per_s

    @property
    def _sequences(self) -> int:
        return self.workload.sequences if self.is_together else 1

    def _best_of(self, body: _Body) -> Advice | None:
        found = []
        for dimm, modules, disk, power in body.rest:
            machine = Machine(body.platform, body.gpus, dimm, modules, disk, power)
            alone, together = self._speed(machine)
            if alone:
                found.append(Advice(machine, alone, together))
        return self._ranked(found)[0] if found else None

    def _speed(self, machine: Machine) -> tuple[float, float]:
        """Tokens a second, one answer alone and all together; zeros where the model does not fit."""
        if machine not in self._speeds:
            profile = machine.profile("machine", self.parts.currency)
            placement = plan(self.shape, profile, self.workload)
            self.planned += 1
            speeds = 0.0, 0.0
            if placement.fits:
                costs, held = (
                    CostModel(self.shape, profile, placement, self.routing),
                    self.workload.context // 2,
                )
                speeds = (
                    costs.decode(1, held).tokens_per_s,
                    costs.decode(self.workload.sequences, held).tokens_per_s,
                )
            self._speeds[machine] = speeds
        return self._speeds[machine]

    def _counts(self, advice: Advice) -> float:
        return advice.together if self.is_together else advice.alone

    def _ranked(self, found: list[Advice]) -> list[Advice]:
        """Fastest first; of those within a hundredth of the fastest that is left, the cheapest."""
        left, ranked = sorted(found, key=self._counts, reverse=True), []
        while left:
            fastest = self._counts(left[0])
            alike = [each for each in left if self._counts(each) * ALIKE >= fastest]
            best = min(alike, key=lambda each: (each.price, -self._counts(each)))
            ranked.append(best)
            left.remove(best)
        return ranked
