"""How many drafted tokens a step computes: those by which most tokens a second are expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What a sequence may lose by drafts, in its own tokens' time: at first, beyond what its drafts have gained at
# most, and more with each of its tokens.
LOAN, MOST_CREDIT, PER_TOKEN = 0.8, 6.0, 0.01
# The same of all sequences together: many short answers may not each lose as much.
LOAN_OF_ALL, PER_TOKEN_OF_ALL = 4.0, 0.008
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
class Account:
    """What may still be lost, in tokens' time; what was gained adds to it.

    per_token  more with each token that is generated
    """

    tokens: float
    per_token: float

    @property
    def is_left(self) -> bool:
        """Whether there may be drafts."""
        return self.tokens > 0

    def generated(self, count: int) -> None:
        """There are so many more tokens."""
        self.tokens = min(self.tokens + self.per_token * count, MOST_CREDIT)

    def drafted(self, gained: float) -> None:
        """A step with drafts gained so many tokens' time, or lost it."""
        self.tokens = min(self.tokens + gained, MOST_CREDIT)


def account_of_all() -> Account:
    """Of all sequences together."""
    return Account(LOAN_OF_ALL, PER_TOKEN_OF_ALL)


class Credit:
    """What a sequence may still lose, of its own and of what all may; and when a draft that does not seem to
    pay is tried."""

    def __init__(self, of_all: Account | None = None) -> None:
        self.own = Account(LOAN, PER_TOKEN)
        self._of_all = of_all or account_of_all()
        self._skipped = 0
        self.interval = FIRST_PROBE

    @property
    def is_left(self) -> bool:
        """Whether it may have drafts."""
        return self.own.is_left and self._of_all.is_left

    def generated(self, count: int) -> None:
        """The sequence has so many more tokens."""
        self.own.generated(count)
        self._of_all.generated(count)

    def drafted(self, gained: float) -> None:
        """A step with drafts of the sequence gained so many tokens' time, or lost it."""
        self.own.drafted(gained)
        self._of_all.drafted(gained)

    def is_probe_due(self) -> bool:
        """Whether a draft that does not seem to pay is to be tried. Called for each one."""
        self._skipped += 1
        return self._skipped >= self.interval and self.is_left

    def probed(self, *, succeeded: bool) -> None:
        """It was tried."""
        self._skipped = 0
        self.interval = FIRST_PROBE if succeeded else min(2 * self.interval, LAST_PROBE)
