"""Counters of hits, transfers and stalls, updated by stores and links, read by metrics and reports."""

from __future__ import annotations

import operator
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of counters, by label: tiers, links or stores. Bytes and seconds, never rates.

    Labels of two words are a link and the reason of the transfer: `demand` (a step needs the bytes) or
    `prefetch` (a step is expected to need them).

    hits            expert uses served from a tier, by tier (`nvme`: had to be read from disk first)
    computed        expert uses computed on a device, by tier
    evictions       experts evicted from a tier, by tier
    moved_bytes     by link
    busy_s          time in which a link had at least one transfer in flight, by link
    moves           transfers, by link and reason
    failed          transfers that failed, by link and reason
    stalled_s       time that compute waited for bytes, by link and reason (`prefetch`: prefetched too late)
    guesses         predicted experts: `made`, and of these `right`
    prefetches      outcome of prefetched experts: `used`; `dropped`, read but never used; `cancelled`, given
                    up before they were read
    rows            Engram rows by where they were found: `asked`, `unique`, `cached`, `read`
    slots           a gauge: free expert slots, by tier
    """

    hits: dict[str, int]
    computed: dict[str, int]
    evictions: dict[str, int]
    moved_bytes: dict[str, int]
    busy_s: dict[str, float]
    moves: dict[str, int]
    failed: dict[str, int]
    stalled_s: dict[str, float]
    guesses: dict[str, int]
    prefetches: dict[str, int]
    rows: dict[str, int]
    slots: dict[str, int]

    def stalled_on(self, link: str) -> float:
        """Seconds that compute waited for `link`, for any reason."""
        return sum(s for label, s in self.stalled_s.items() if label.rpartition(" ")[0] == link)


_SECONDS = ("busy_s", "stalled_s")


@dataclass
class Telemetry:
    """Thread-safe counters. One object per engine, passed to its stores."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counts: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    _followed: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)

    def add(self, counter: str, label: str, amount: float = 1) -> None:
        """Add to a counter of Snapshot."""
        with self._lock:
            self._counts[counter][label] += amount

    def set(self, level: str, label: str, value: float) -> None:
        """Set a gauge of Snapshot."""
        with self._lock:
            self._counts[level][label] = value

    def follow(self, counter: str, label: str, count: torch.Tensor) -> None:
        """From now on, a counter of Snapshot includes `count` `[1]` int64, which native code adds to."""
        with self._lock:
            self._counts[counter][label] += 0
            self._followed.append((counter, label, count))

    def snapshot(self) -> Snapshot:
        """A copy of all counters."""
        with self._lock:
            whole: dict[str, Any] = {
                name: {label: n if name in _SECONDS else int(n) for label, n in self._counts[name].items()}
                for name in Snapshot.__dataclass_fields__
            }
            for name, label, count in self._followed:
                whole[name][label] += int(count)
            return Snapshot(**whole)


class Spans:
    """The changes of counters while something goes on, in all the spans of time in which it did."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        now = telemetry.snapshot()
        # What was counted in spans that are over, and how the counters stood when one began that is not:
        # replaced together, since other threads read them.
        self._counted: tuple[Snapshot, Snapshot | None] = since(now, now), None

    def goes_on(self, now: bool) -> None:
        """Say whether it does, from now on."""
        counted, begun = self._counted
        if now and begun is None:
            self._counted = counted, self._telemetry.snapshot()
        elif not now and begun is not None:
            self._counted = _each(operator.add, counted, since(begun, self._telemetry.snapshot())), None

    def snapshot(self) -> Snapshot:
        """What was counted so far."""
        counted, begun = self._counted
        if begun is None:
            return counted
        return _each(operator.add, counted, since(begun, self._telemetry.snapshot()))


def since(before: Snapshot, after: Snapshot) -> Snapshot:
    """Counters of the time between two snapshots."""
    return _each(operator.sub, after, before)


def _each(combine: Callable[[float, float], float], one: Snapshot, other: Snapshot) -> Snapshot:
    """Two snapshots, counter by counter; a label that one of them lacks is 0 there."""
    found: dict[str, dict[str, Any]] = {}
    for name, counter in vars(one).items():
        of_other = vars(other)[name]
        labels = counter.keys() | of_other.keys()
        found[name] = {label: combine(counter.get(label, 0), of_other.get(label, 0)) for label in labels}
    return Snapshot(**found)
