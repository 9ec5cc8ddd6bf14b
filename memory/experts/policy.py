"""Eviction policies behind one interface, and a simulation of their hit rates.

Slots are shared out by layer, so a policy sees one layer's experts only. Layers are used in turn, again
and again; across layers, "least recently used" would always be the one that is needed next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

# Where GPUs and DRAM hold different experts, one that moves to a full GPU displaces another. It must be worth
# this much more than that one, or two of similar value would swap back and forth for nothing.
EXCHANGE_MARGIN = 1.5


# What the two neighbouring layers used last: the previous one in this step, the next one in the step before.
Neighbours = tuple[Collection[int], Collection[int]]
NO_NEIGHBOURS: Neighbours = ((), ())


def neighbours_of(newest: Sequence[Collection[int]], layer: int) -> Neighbours:
    """What the neighbours of `layer` used last, of what each layer used last when its turn has come."""
    before = newest[layer - 1] if layer > 0 else ()
    after = newest[layer + 1] if layer + 1 < len(newest) else ()
    return before, after


class ExpertPolicy(ABC):
    """Ranks the experts of one layer by their value to the cache. `experts` is their number."""

    name: str

    def __init__(self, experts: int) -> None:
        self.experts = experts

    @abstractmethod
    def used(self, expert_ids: Collection[int], neighbours: Neighbours = NO_NEIGHBOURS) -> None:
        """A step used these experts of the layer."""

    @abstractmethod
    def scores(self) -> np.ndarray:
        """The value of keeping each expert, `[experts]` float64; the lowest is evicted first."""

    def victim(self, candidates: Collection[int]) -> int:
        """The candidate of least value; the highest number among equals."""
        scores = self.scores()
        return max(candidates, key=lambda expert: (-scores[expert], expert))

    def ranking(self) -> list[int]:
        """All experts, most valuable first."""
        scores = self.scores()
        return sorted(range(self.experts), key=lambda expert: (-scores[expert], expert))


class Lru(ExpertPolicy):
    """Evicts the least recently used expert."""

    name = "lru"

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self._step = 0
        self._last = np.full(experts, -1.0)

    def used(self, expert_ids: Collection[int], neighbours: Neighbours = NO_NEIGHBOURS) -> None:
        self._step += 1
        self._last[list(expert_ids)] = self._step

    def scores(self) -> np.ndarray:
        return self._last


class AgedLfu(ExpertPolicy):
    """Evicts the least frequently used expert; old uses decay.

    half_life is the number of steps after which a use counts for half.
    """

    name = "lfu"

    def __init__(self, experts: int, *, half_life: float = 256.0) -> None:
        super().__init__(experts)
        self._decay = 0.5 ** (1.0 / half_life)
        self._counts = np.zeros(experts)

    def used(self, expert_ids: Collection[int], neighbours: Neighbours = NO_NEIGHBOURS) -> None:
        self._counts *= self._decay
        self._counts[list(expert_ids)] += 1.0

    def scores(self) -> np.ndarray:
        return self._counts


class Predictive(ExpertPolicy):
    """Predicts from the experts of the last steps, and from recent deviations from usual frequency.

    It learns how often each expert of its layer is used one step after any expert of the layer itself and of
    its two neighbours. An expert's value is its usual share of uses, adjusted by how much the experts of the
    last steps, and its own recent uses, raise or lower the odds. A router's own prediction for the coming
    step, given to `expected`, ranks those experts above all others until the layer has been used.

    `prior` has the shares of uses from an earlier routing trace, `[experts]`.
    """

    name = "predictive"

    FADES = 0.7  # with every step since it was used, an expert speaks so much less of what comes,
    LEAST = 0.3  # and below this no longer: those of four steps speak
    FOLLOWS = 1.5  # above 1, since the mean over experts hides what they agree on
    OF_LATE = 0.25
    AT_LEAST = 0.1  # of what is usual
    # Pseudo-counts per expert of the layer, so that a single use among many experts does not count as
    # evidence:
    HALF_LIFE = 1.33  # after which those of late count half
    DOUBT = 2.0  # after an expert, which outweigh what is usual
    PRIOR = 4.0  # that a profile, or the lack of one, counts like
    MEMORY_STEPS = 4096  # after which all that was learned counts half

    def __init__(self, experts: int, *, prior: np.ndarray | None = None) -> None:
        super().__init__(experts)
        shares = np.full(experts, 1.0 / experts) if prior is None else prior
        self._uses = self.PRIOR * experts * shares + 0.01
        self._late = self._uses / self._uses.sum()
        # Of experts used lately, the layer's and its neighbours'; which of them still say something.
        self._traces = np.zeros(3 * experts, np.float32)
        self._speaking = np.zeros(0, np.int64)
        self._follows = np.zeros((3 * experts, experts), np.float32)
        self._steps = 0
        self._expected: list[int] = []
        self._unguessed: np.ndarray | None = None  # scores without the guess, until something is used
        self._scores: np.ndarray | None = None  # until something is used or expected

    def expected(self, expert_ids: Collection[int]) -> None:
        """A prediction of the experts of this layer's next step."""
        self._expected = list(expert_ids)
        self._scores = None

    def used(self, expert_ids: Collection[int], neighbours: Neighbours = NO_NEIGHBOURS) -> None:
        now = list(expert_ids)
        self._follows[self._speaking[:, None], now] += self._traces[self._speaking, None]
        self._traces *= self.FADES
        for traces, experts in zip(self._traces.reshape(3, -1), (now, *neighbours), strict=True):
            if 2 * len(experts) <= self.experts:  # else a prompt's, after which everything follows
                traces[list(experts)] += 1.0
        self._speaking = np.flatnonzero(self._traces >= self.LEAST)
        fades = 0.5 ** (len(now) / (self.HALF_LIFE * self.experts))
        self._late *= fades
        self._late[now] += (1.0 - fades) / max(1, len(now))
        self._uses[now] += 1.0
        self._steps += 1
        if self._steps % self.MEMORY_STEPS == 0:
            self._uses *= 0.5
            self._follows *= 0.5
        self._expected = []
        self._unguessed = self._scores = None

    def uses(self) -> np.ndarray:
        """How often each expert was used, with what is usual before anything was seen, `[experts]`."""
        return self._uses

    def scores(self) -> np.ndarray:
        if self._unguessed is None:
            self._unguessed = self._own_scores()
        if self._scores is None:
            self._scores = self._unguessed.copy()
            self._scores[self._expected] += 1e6
        return self._scores

    def _own_scores(self) -> np.ndarray:
        usual = self._uses / self._uses.sum()  # shares of a step's uses, like all below
        scores: np.ndarray = usual + self.OF_LATE * (self._late - usual)
        if len(self._speaking):
            rows = self._follows[self._speaking]
            weights = self._traces[self._speaking]
            doubt = self.DOUBT * self.experts
            weights /= weights.sum() * (rows.sum(axis=1) + doubt)
            follows = weights @ rows + doubt * weights.sum() * usual
            scores += self.FOLLOWS * (follows - usual)
        np.maximum(scores, self.AT_LEAST * usual, out=scores)
        return scores


POLICIES: dict[str, Callable[[int], ExpertPolicy]] = {"lru": Lru, "lfu": AgedLfu, "predictive": Predictive}


@dataclass(frozen=True)
class Replay:
    """Result of simulating a policy on a trace: hits, and evictions."""

    hits: int
    exchanges: int


def replay(
    trace: Sequence[Collection[int]],
    slots: int,
    policy: ExpertPolicy,
    margin: float = 1.0,
    neighbours: Iterable[Neighbours] = repeat(NO_NEIGHBOURS),
) -> Replay:
    """Simulate one layer with `slots` slots under `policy`.

    trace: the experts of each step; neighbours: those of the adjacent layers. All experts of a step are
    loaded if each is worth `margin` times as much as the one evicted for it; one that was just loaded or is
    used in this step is not evicted for another of the same step unless there is no choice.
    """
    resident: set[int] = set()
    hits = exchanges = 0
    for step, used_nearby in zip(trace, neighbours, strict=False):
        needed = set(step)
        hits += len(needed & resident)
        policy.used(needed, used_nearby)
        for expert in sorted(needed - resident):
            if len(resident) >= slots:
                candidates = resident - needed or resident
                leaving = policy.victim(candidates)
                # A new expert that is worth less than all held ones is used without being kept.
                if policy.scores()[expert] < margin * policy.scores()[leaving]:
                    continue
                resident.remove(leaving)
                exchanges += 1
            resident.add(expert)
    return Replay(hits, exchanges)


def belady_hits(trace: Sequence[Collection[int]], slots: int, experts: int) -> int:
    """Belady's optimum: the most hits any policy could have; evicts what is needed furthest in the future.

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
