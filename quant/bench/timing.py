"""Fair timing on a machine that others use as well.

The memory bandwidth of a shared machine may double or halve within seconds. So cases that are compared take
turns, each a few milliseconds at a time, and a ratio is the median of the ratios of the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

# Threads of another library's pool spin for a while after their work; they must not take the next one's time.
SETTLE_S = 0.005


@dataclass(frozen=True)
class Case:
    """Something to time: `run(turn)` does `work` (bytes, operations, rows) where that turn is due."""

    name: str
    work: float
    run: Callable[[int], object]


@dataclass(frozen=True)
class Rates:
    """Work per second of each case in each turn."""

    per_turn: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Work per second of a case."""
        return statistics.median(self.per_turn[name])

    def ratio(self, name: str, to: str) -> float:
        """How fast a case is in units of another, turn by turn."""
        pairs = zip(self.per_turn[name], self.per_turn[to], strict=True)
        return statistics.median(rate / other for rate, other in pairs)


def host_seconds(run: Callable[[], object]) -> float:
    """How long `run` takes, by the host's clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(
    cases: Sequence[Case], turns: int, seconds: Callable[[Callable[[], object]], float] = host_seconds
) -> Rates:
    """Time the cases one after the other, `turns` times after a first that is not counted.

    seconds  runs what it is given and says how long that took
    """
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(turns + 1):
        for place in range(len(cases)):
            case = cases[(turn + place) % len(cases)]  # nobody always comes after the same neighbour
            time.sleep(SETTLE_S)
            taken = seconds(lambda case=case, turn=turn: case.run(turn))  # type: ignore[misc]
            if turn:
                rates[case.name].append(case.work / taken)
    return Rates(rates)


class Neighbours:
    """How many cores other processes kept busy since this was made: what to doubt the figures by.

    What this process started counts as its own, if it was running when this was made.
    """

    def __init__(self) -> None:
        self._start, self._others = time.perf_counter(), self._others_s()

    def cores(self) -> float:
        """Cores in use elsewhere, on average."""
        return max(0.0, self._others_s() - self._others) / (time.perf_counter() - self._start)

    def _others_s(self) -> float:
        machine, here = psutil.cpu_times(), psutil.Process()
        busy = sum(getattr(machine, kind, 0.0) for kind in ("user", "nice", "system", "steal"))
        return float(busy - sum(_cpu_s(process) for process in (here, *here.children(recursive=True))))


def _cpu_s(process: psutil.Process) -> float:
    """Processor seconds of a process, and of those that it started and that have ended."""
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:  # it has just ended, and counts where it was started
        return 0.0
    return float(used.user + used.system + used.children_user + used.children_system)


@dataclass(frozen=True)
class Figure:
    """One result: `target` is what was promised, at least or `at_most`; None where nothing was."""

    name: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the promise was kept."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target
