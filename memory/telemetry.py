"""What moved, hit and stalled: counters that stores and links add to, read by metrics and reports."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Snapshot:
    """Counters of a moment, by label: tiers, links or stores. Bytes and seconds, never rates.

    hits            expert uses served from a tier, by tier (`nvme`: had to be read from disk first)
    computed        expert uses computed on a device, by tier
    moved_bytes     by link
    moves           transfers by link and reason (`demand`, `prefetch`)
    stalled_s       time that compute waited for bytes, by link
    prefetches      outcome of prefetched experts: `used`, `dropped`
    rows            Engram rows by where they were found: `asked`, `unique`, `cached`, `read`
    """

    hits: dict[str, int]
    computed: dict[str, int]
    moved_bytes: dict[str, int]
    moves: dict[str, int]
    stalled_s: dict[str, float]
    prefetches: dict[str, int]
    rows: dict[str, int]


@dataclass
class Telemetry:
    """Thread-safe counters. One object per engine, handed down to its stores."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counts: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )

    def add(self, counter: str, label: str, amount: float = 1) -> None:
        """Add to a counter of Snapshot."""
        with self._lock:
            self._counts[counter][label] += amount

    def snapshot(self) -> Snapshot:
        """A copy of all counters."""
        with self._lock:
            whole = {
                name: {label: int(n) for label, n in self._counts[name].items()}
                for name in ("hits", "computed", "moved_bytes", "moves", "prefetches", "rows")
            }
            return Snapshot(**whole, stalled_s=dict(self._counts["stalled_s"]))
