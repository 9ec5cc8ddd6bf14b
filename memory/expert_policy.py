"""Which expert leaves a full tier: policies behind one interface, and what each would have hit.

Slots are shared out by layer, so a policy sees one layer's experts only. Layers are used in turn, again
and again; across layers, "least recently used" would always be the one that is needed next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

# Where cards and DRAM hold different experts, one that goes to a full card sends another back. It must be
# worth so much more than that one; else two that are used alike change places again and again, for nothing.
EXCHANGE_MARGIN = 1.5


class ExpertPolicy(ABC):
    """Ranks the experts of one layer by how much they are worth keeping. `experts` is their number."""

    name: str

    def __init__(self, experts: int) -> None:
        self.experts = experts

    @abstractmethod
    def used(self, expert_ids: Collection[int]) -> None:
        """A step used these experts."""

    @abstractmethod
    def scores(self) -> np.ndarray:
        """How much each expert is worth keeping, `[experts]` float64; the lowest leaves first."""

    def victim(self, candidates: Collection[int]) -> int:
        """The one of `candidates` that is worth least; the highest number among equals."""
        scores = self.scores()
        return max(candidates, key=lambda expert: (-scores[expert], expert))

    def ranking(self) -> list[int]:
        """All experts, those most worth keeping first."""
        scores = self.scores()
        return sorted(range(self.experts), key=lambda expert: (-scores[expert], expert))


class Lru(ExpertPolicy):
    """Least recently used leaves first."""

    name = "lru"

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self._step = 0
        self._last = np.full(experts, -1.0)

    def used(self, expert_ids: Collection[int]) -> None:
        self._step += 1
        self._last[list(expert_ids)] = self._step

    def scores(self) -> np.ndarray:
        return self._last


class AgedLfu(ExpertPolicy):
    """Least frequently used leaves first; what was used long ago counts for less and less.

    half_life is the number of steps after which a use counts half. `prior` are uses seen in an earlier
    profile, `[experts]`, as shares of all uses; they count like `prior_steps` steps of use.
    """

    name = "lfu"

    def __init__(
        self,
        experts: int,
        *,
        half_life: float = 256.0,
        prior: np.ndarray | None = None,
        prior_steps: float = 64.0,
    ) -> None:
        super().__init__(experts)
        self._decay = 0.5 ** (1.0 / half_life)
        self._counts = np.zeros(experts) if prior is None else prior * prior_steps

    def used(self, expert_ids: Collection[int]) -> None:
        self._counts *= self._decay
        self._counts[list(expert_ids)] += 1.0

    def scores(self) -> np.ndarray:
        return self._counts


class Predictive(AgedLfu):
    """Aged frequency, and which experts tend to follow those of the newest step.

    It learns, per layer, how often expert b is used in the step after expert a (a decayed count), and
    adds the chance of being used next to the frequency; a router's own guess for the coming step, given
    to `expected`, lifts those experts above all others until the layer has been used.
    """

    name = "predictive"

    def __init__(self, experts: int, *, half_life: float = 32.0, prior: np.ndarray | None = None) -> None:
        super().__init__(experts, half_life=half_life, prior=prior)
        self._follows = np.zeros((experts, experts))
        self._newest: list[int] = []
        self._expected: list[int] = []
        self._scores: np.ndarray | None = None  # until something is used or expected

    def expected(self, expert_ids: Collection[int]) -> None:
        """A guess at the experts of this layer's coming step."""
        self._expected = list(expert_ids)
        self._scores = None

    def used(self, expert_ids: Collection[int]) -> None:
        super().used(expert_ids)
        now = list(expert_ids)
        if self._newest:
            self._follows[np.ix_(self._newest, now)] += 1.0
            self._follows[self._newest] *= 0.99
        self._newest = now
        self._expected = []
        self._scores = None

    def scores(self) -> np.ndarray:
        if self._scores is None:
            self._scores = self._compute_scores()
        return self._scores

    def _compute_scores(self) -> np.ndarray:
        frequency = self._counts / max(self._counts.sum(), 1e-9)
        worth: np.ndarray = frequency.copy()
        if self._newest:
            rows = self._follows[self._newest]
            totals = rows.sum(axis=1, keepdims=True)
            worth += (rows / np.maximum(totals, 8.0)).mean(axis=0)
        worth[self._expected] += 1e6
        return worth


POLICIES: dict[str, Callable[[int], ExpertPolicy]] = {"lru": Lru, "lfu": AgedLfu, "predictive": Predictive}


@dataclass(frozen=True)
class Replay:
    """What a policy would have done on a trace: uses served, and experts that left for others."""

    hits: int
    exchanges: int


def replay(trace: Sequence[Collection[int]], slots: int, policy: ExpertPolicy, margin: float = 1.0) -> Replay:
    """Uses of one layer that `slots` slots under `policy` would have served.

    trace: the experts of each step. All experts of a step are brought in, as far as each is worth `margin`
    times as much as what leaves for it; one that was just brought in or is used in this step does not leave
    for another of the same step, while there is a choice.
    """
    resident: set[int] = set()
    hits = exchanges = 0
    for step in trace:
        needed = set(step)
        hits += len(needed & resident)
        policy.used(needed)
        for expert in sorted(needed - resident):
            if len(resident) >= slots:
                candidates = resident - needed or resident
                leaving = policy.victim(candidates)
                # A newcomer that is worth less than all that are held is used without being kept.
                if policy.scores()[expert] < margin * policy.scores()[leaving]:
                    continue
                resident.remove(leaving)
                exchanges += 1
            resident.add(expert)
    return Replay(hits, exchanges)


def belady_hits(trace: Sequence[Collection[int]], slots: int, experts: int) -> int:
    """The most uses that any policy could have served: what is needed furthest in the future leaves.

    Bringing an expert in only to be evicted before its next use is allowed to be skipped, so this
    bounds policies that bypass as well.
    """
    never = len(trace) + 1
    next_use = np.full((len(trace) + 1, experts), never, dtype=np.int64)
    for step in range(len(trace) - 1, -1, -1):
        next_use[step] = next_use[step + 1]
        next_use[step][list(trace[step])] = step
    resident: set[int] = set()
    hits = 0
    for step, ids in enumerate(trace):
        needed = set(ids)
        hits += len(needed & resident)
        after = next_use[step + 1]
        ranked = sorted(resident | needed, key=lambda expert: (after[expert], expert))
        resident = set(ranked[:slots])
    return hits
