"""How many drafted tokens a step computes: those by which most tokens a second are expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What a sequence may lose by drafts, in its own tokens' time: at first, more with each of its tokens up to an
# allowance, and what its drafts have gained up to a credit, so that a text that changes is noticed.
LOAN, PER_TOKEN, MOST_ALLOWED, MOST_CREDIT = 0.8, 0.01, 6.0, 15.0
# The loan for drafts of weights: making one may take as long as a step, and the first may be a wrong one.
LOAN_FOR_WEIGHTS = 4.0
# The same of all sequences together, by drafts that are looked up: many short answers may not each lose as
# much. What weights draft is counted by drafter (rests.py).
LOAN_OF_ALL, PER_TOKEN_OF_ALL, MOST_CREDIT_OF_ALL = 4.0, 0.004, 30.0
# Of the credit that all have earned, what a new sequence may lose beyond its own loan.
LENT_BY_ALL = 0.1
# A draft that does not seem to pay is tried all the same after so many of its sequence; after twice as many
# each time that it did not pay.
FIRST_PROBE, LAST_PROBE = 8, 1024
# Where trying has paid for no sequence, the next ones begin to try so late.
LATEST_PROBE = 64
# A gain that is expected to be smaller than this is none: of what seems to pay, most is overrated.
WORTHWHILE = 1.05


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
    if len(chances) == 1:
        return [_best_count(tokens, chances[0][:room], seconds, drafting, computes_again=computes_again)]
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


def _best_count(
    tokens: int,
    chances: Sequence[float],
    seconds: Callable[[int], float],
    drafting: Callable[[Sequence[int]], float],
    *,
    computes_again: bool,
) -> int:
    """The same of one draft, as of most steps, which some models take no longer for than this does."""
    plain_s = seconds(tokens)
    reached = expected = 1.0
    best, most = 0, WORTHWHILE / plain_s
    for count, chance in enumerate(chances, 1):
        reached *= chance
        expected += reached
        step_s = seconds(tokens + count)
        took = step_s + drafting((count,))
        if computes_again:
            took += (1 - reached) * (step_s - plain_s)
        if expected > most * took:
            best, most = count, expected / took
    return best


@dataclass
class Account:
    """What may still be lost, in tokens' time; what was gained adds to it.

    per_token  more with each token that is generated, up to MOST_ALLOWED
    most       what it holds at most
    """

    tokens: float
    per_token: float
    most: float = MOST_CREDIT

    @property
    def is_left(self) -> bool:
        """Whether there may be drafts."""
        return self.tokens > 0

    @property
    def earned(self) -> float:
        """What of it was gained."""
        return max(self.tokens - MOST_ALLOWED, 0.0)

    def generated(self, count: int) -> None:
        """There are so many more tokens."""
        if self.tokens < MOST_ALLOWED:
            self.tokens = min(self.tokens + self.per_token * count, MOST_ALLOWED)

    def drafted(self, gained: float) -> None:
        """A step with drafts gained so many tokens' time, or lost it."""
        self.tokens = min(self.tokens + gained, self.most)


def account_of_all() -> Account:
    """Of all sequences together."""
    return Account(LOAN_OF_ALL, PER_TOKEN_OF_ALL, MOST_CREDIT_OF_ALL)


class Tries:
    """What has come of trying, of all sequences.

    first  after how many drafts that do not seem to pay a sequence tries one
    """

    def __init__(self) -> None:
        self.first = FIRST_PROBE

    def tried(self, *, paid: bool) -> None:
        """A sequence did."""
        self.first = max(self.first // 2, FIRST_PROBE) if paid else min(2 * self.first, LATEST_PROBE)


class Credit:
    """What a sequence may still lose, of its own and of what all may; and when a draft that does not seem to
    pay is tried."""

    def __init__(self, of_all: Account | None = None, tries: Tries | None = None) -> None:
        self._of_all = of_all or account_of_all()
        lent = LENT_BY_ALL * self._of_all.earned
        self._looked_up = Account(LOAN + lent, PER_TOKEN)
        self._of_weights = Account(LOAN_FOR_WEIGHTS, PER_TOKEN)
        self._tries = tries or Tries()
        self._skipped = 0
        self.interval = self._tries.first
        self._earned = lent  # by look-ups, in tokens' time, less what looking has cost since

    @property
    def pays_looking(self) -> bool:
        """Whether look-ups have gained so much here that looking on costs none but them."""
        return self._earned > 0 and self.is_left(is_free=True)

    def looked(self, cost: float) -> None:
        """Looking took the time of so many tokens, and found nothing that is computed."""
        self._earned -= cost
        self._looked_up.drafted(-cost)
        self._of_all.drafted(-cost)

    def own(self, *, is_free: bool) -> Account:
        """The sequence's, for drafts that are looked up, or others."""
        return self._looked_up if is_free else self._of_weights

    def is_left(self, *, is_free: bool) -> bool:
        """Whether it may have drafts that are looked up, or others."""
        return self.own(is_free=is_free).is_left and (not is_free or self._of_all.is_left)

    def generated(self, count: int) -> None:
        """The sequence has so many more tokens."""
        self._looked_up.generated(count)
        self._of_weights.generated(count)
        self._of_all.generated(count)

    def drafted(self, gained: float, *, is_free: bool) -> None:
        """A step with drafts of the sequence, looked up or others, gained so many tokens' time or lost it."""
        self.own(is_free=is_free).drafted(gained)
        if is_free:
            self._of_all.drafted(gained)
            self._earned = min(self._earned + gained, MOST_CREDIT)

    def is_probe_due(self, *, is_free: bool) -> bool:
        """Whether a draft that does not seem to pay is to be tried. Called for each one."""
        self._skipped += 1
        return self._skipped >= self.interval and self.is_left(is_free=is_free)

    def probed(self, *, paid: bool) -> None:
        """It was tried."""
        self._skipped = 0
        self._tries.tried(paid=paid)
        self.interval = FIRST_PROBE if paid else min(2 * self.interval, LAST_PROBE)
