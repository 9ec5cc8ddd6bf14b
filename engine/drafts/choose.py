"""How many drafted tokens a step computes: those by which most tokens a second are expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What a sequence may lose by drafts, in its own tokens' time: at first, beyond what its drafts have gained at
# most, and more with each of its tokens. So an answer of a hundred tokens is at most 2 % late.
LOAN, MOST_CREDIT, PER_TOKEN = 0.8, 6.0, 0.01
# A draft that does not seem to pay is tried all the same after so many tokens of its sequence; after twice as
# many each time that it failed.
FIRST_PROBE, LAST_PROBE = 8, 1024
# A gain that is expected to be smaller than this is none.
WORTHWHILE = 1.02


def best_counts(
    tokens: int,
    chances: Sequence[Sequence[float]],
    room: int,
    seconds: Callable[[int], float],
    drafting: Callable[[Sequence[int]], float],
    *,
    computes_again: bool = False,
) -> list[int]:
    """How many tokens of each draft to compute.

    tokens    that the step computes anyway, one at least of each sequence
    chances   of each draft's tokens to be accepted if those before them are; none for sequences without
    room      drafted tokens that the step may have
    seconds   that a step of so many tokens takes
    drafting  seconds that it takes to draft so many tokens for each
    computes_again  a draft that is not accepted has the others computed again, with the next step
    """
    counts = [0] * len(chances)
    reached = [1.0] * len(chances)  # how likely all tokens taken so far are accepted
    expected = float(len(chances))
    best, most = counts.copy(), WORTHWHILE * expected / seconds(tokens)
    for added in range(1, room + 1):
        open_drafts = [i for i, chain in enumerate(chances) if counts[i] < len(chain)]
        if not open_drafts:
            break
        likeliest = max(open_drafts, key=lambda i: reached[i] * chances[i][counts[i]])
        reached[likeliest] *= chances[likeliest][counts[likeliest]]
        counts[likeliest] += 1
        expected += reached[likeliest]
        took = seconds(tokens + added) + drafting(counts)
        if computes_again:
            fails = 1 - math.prod(chance for chance, count in zip(reached, counts, strict=True) if count)
            took += fails * (seconds(tokens + added) - seconds(tokens))
        rate = expected / took
        if rate > most:
            best, most = counts.copy(), rate
    return best


@dataclass
class Credit:
    """What a sequence may still lose, in tokens; and when a draft that does not seem to pay is tried."""

    tokens: float = LOAN
    skipped: int = 0
    interval: int = FIRST_PROBE

    @property
    def is_left(self) -> bool:
        """Whether it may have drafts."""
        return self.tokens > 0

    def generated(self, count: int) -> None:
        """The sequence has so many more tokens."""
        self.tokens = min(self.tokens + PER_TOKEN * count, MOST_CREDIT)

    def drafted(self, gained: float) -> None:
        """A step with drafts of the sequence gained so many tokens' time, or lost it."""
        self.tokens = min(self.tokens + gained, MOST_CREDIT)

    def is_probe_due(self) -> bool:
        """Whether a draft that does not seem to pay is to be tried. Called for each one."""
        self.skipped += 1
        return self.skipped >= self.interval and self.is_left

    def probed(self, *, succeeded: bool) -> None:
        """It was tried."""
        self.skipped = 0
        self.interval = FIRST_PROBE if succeeded else min(2 * self.interval, LAST_PROBE)
