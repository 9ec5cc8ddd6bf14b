"""Which replica a sequence goes to: the one that holds most of its prompt, of several the least busy one, of
several that are idle the one that holds least.

What a replica holds it tells every second (engine/cache/digest.py). What it was given since then, and what it
still computes, counts as held too, so that the second of two requests with one beginning follows the first. A
replica that has many more sequences than the idlest one is passed over, whatever it holds: computing a prompt
again is better than waiting for it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.cache.digest import BLOCK, HASH_BYTES
from engine.engine import EngineStats
from server.cluster.asked import ReplicaState
from server.cluster.totals import counted, total

# A replica has told what a sequence has left in its cache so long after its end.
TOLD_S = 10.0
# Of its slots, how many more than the idlest one a replica may have taken and still be preferred.
BUSIER_SHARE = 0.5

Blocks = Sequence[bytes]


@dataclass(frozen=True)
class Routed:
    """What was decided so far: sequences by replica and by reason (`prefix`, `load`), and tokens of their
    prompts that were expected to be found there."""

    sequences: Mapping[tuple[str, str], int]
    tokens: Mapping[str, int]


@dataclass
class _Replica:
    state: ReplicaState | None = None
    held: frozenset[bytes] = frozenset()
    given: Counter[bytes] = field(default_factory=Counter)  # of sequences that run, or ended not long ago
    running: int = 0

    @property
    def slots(self) -> int:
        return 1 if self.state is None else self.state.slots


@dataclass
class _Given:
    """A sequence's place; `known` blocks of its prompt were there before."""

    replica: str
    blocks: Blocks
    known: int
    has_arrived: bool = False


class Affinity:
    """Thread-safe: a router decides in its own thread, and metrics are read in others."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._replicas: dict[str, _Replica] = {}
        self._attempts = itertools.count(1)
        self._given: dict[int, _Given | None] = {}  # None before it is given to a replica
        self._ended: deque[tuple[float, _Given]] = deque()
        self._sequences: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._gone: set[str] = set()
        self._counted_before: list[EngineStats] = []  # by those that are gone

    def tell(self, replica: str, state: ReplicaState) -> None:
        """What a replica says of itself."""
        with self._lock:
            known = self._replicas.setdefault(replica, _Replica())
            if known.state is None or known.state.hashes != state.hashes:
                told = state.hashes
                known.held = frozenset(told[at : at + HASH_BYTES] for at in range(0, len(told), HASH_BYTES))
            known.state = state

    def keep_only(self, replicas: Iterable[str]) -> None:
        """These are the replicas that there are."""
        with self._lock:
            names = set(replicas)
            for name in self._replicas.keys() - names:
                self._remove(name)
            for name in names:
                self._replicas.setdefault(name, _Replica())

    def lose(self, replica: str) -> None:
        """A replica is gone, with all it held."""
        with self._lock:
            self._remove(replica)

    def order(self, blocks: Blocks, among: Sequence[str]) -> list[str]:
        """The replicas for a prompt with these blocks, the best first."""
        with self._lock:
            self._forget()
            loads = {name: self._of(name).running for name in among}
            idlest = min(loads.values(), default=0)

            def rank(name: str) -> tuple[bool, int, int, int]:
                at = self._of(name)
                is_busy = loads[name] - idlest > BUSIER_SHARE * at.slots
                known = 0 if is_busy else self._known_blocks(name, blocks)
                return is_busy, -known, loads[name], len(at.held) + len(at.given)

            return sorted(among, key=rank)

    def begin(self) -> int:
        """The number of an attempt to have a sequence computed; whoever begins it says when it has ended."""
        with self._lock:
            attempt = next(self._attempts)
            self._given[attempt] = None
            return attempt

    def give(self, attempt: int, replica: str, blocks: Blocks) -> None:
        """An attempt is to go to a replica, or to another one than before. No-op if it has ended."""
        with self._lock:
            if attempt in self._given:
                self._give(attempt, replica, blocks)

    def arrived(self, attempt: int, replica: str, blocks: Blocks) -> None:
        """A replica, the one that it was given to or another one, has accepted it. No-op if it has ended."""
        with self._lock:
            if attempt not in self._given:
                return
            given = self._given[attempt]
            if given is None or given.replica != replica:
                given = self._give(attempt, replica, blocks)
            given.has_arrived = True
            self._sequences[replica, "prefix" if given.known else "load"] += 1
            self._tokens[replica] += BLOCK * given.known

    def end(self, attempt: int) -> None:
        """An attempt has ended, in whatever way and wherever it was."""
        with self._lock:
            given = self._given.get(attempt)
            if given is not None and given.has_arrived:
                self._of(given.replica).running -= 1
                self._ended.append((self._now() + TOLD_S, given))
            else:
                self._take_back(attempt)
            self._given.pop(attempt, None)

    @property
    def up(self) -> int:
        """How many replicas there are."""
        with self._lock:
            return len(self._replicas)

    @property
    def context(self) -> int | None:
        """Tokens of a sequence that any of them can compute; None before they have told."""
        with self._lock:
            told = [at.state.context for at in self._replicas.values() if at.state is not None]
            return min(told, default=None)

    @property
    def gone(self) -> int:
        """How many there were: dead, or taken away."""
        with self._lock:
            return len(self._gone)

    @property
    def routed(self) -> Routed:
        """What was decided so far."""
        with self._lock:
            return Routed(dict(self._sequences), dict(self._tokens))

    def stats(self) -> EngineStats:
        """The figures of all replicas together."""
        with self._lock:
            states = [replica.state for replica in self._replicas.values()]
            now = [state.stats for state in states if state is not None]
            return total([*self._counted_before, *now])

    # What follows holds the lock.

    def _of(self, replica: str) -> _Replica:
        return self._replicas.get(replica) or _Replica()

    def _remove(self, replica: str) -> None:
        found = self._replicas.pop(replica, None)
        for attempt, given in self._given.items():
            if given is not None and given.replica == replica:
                self._given[attempt] = None
        if found is not None and replica not in self._gone:
            self._gone.add(replica)
            if found.state is not None:
                self._counted_before = [total([*self._counted_before, counted(found.state.stats)])]

    def _known_blocks(self, replica: str, blocks: Blocks) -> int:
        """Blocks of the prompt's beginning that a replica has, or will have soon."""
        at = self._of(replica)
        for number, block in enumerate(blocks):
            if block not in at.held and not at.given[block]:
                return number
        return len(blocks)

    def _give(self, attempt: int, replica: str, blocks: Blocks) -> _Given:
        self._take_back(attempt)
        at = self._of(replica)
        given = self._given[attempt] = _Given(replica, blocks, self._known_blocks(replica, blocks))
        at.running += 1
        at.given.update(blocks)
        return given

    def _take_back(self, attempt: int) -> None:
        """It was given to a replica and did not get there."""
        given = self._given.get(attempt)
        if given is not None:
            self._given[attempt] = None
            at = self._of(given.replica)
            at.running -= 1
            at.given -= Counter(given.blocks)

    def _forget(self) -> None:
        """What has ended long enough ago."""
        while self._ended and self._ended[0][0] <= self._now():
            _, given = self._ended.popleft()
            at = self._of(given.replica)
            at.given -= Counter(given.blocks)


_shared: dict[str, Affinity] = {}


def affinity_to(deployment: str) -> Affinity:
    """This process's own for a deployment: its routers and who asks them share it."""
    return _shared.setdefault(deployment, Affinity())
