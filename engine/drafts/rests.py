"""Which drafters rest: those that have cost more time than they saved, all that they cause included.

Drafts of weights cost more than the steps that compute them: what the model captures is copied and keyed for
every token, drafted or not. So each such drafter has an account of what it saved and cost, over all answers.
Once what it may lose is lost, it is asked for nothing and told nothing. Texts and machines change, so that a
rest ends; if that changes nothing, the next rest is longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# What a drafter may lose until it rests, in tokens' time, and what it may lose of what it has gained: some
# answers go badly where most go well.
LOAN, MOST_CREDIT = 10.0, 30.0
# A drafter's first drafts take longer: what they cost is not counted. After some more it is known whether it
# could pay at all.
SURE, ENOUGH = 2, 8
# Steps of the first rest, and of the longest: each is twice as long as the one before.
FIRST_REST, LAST_REST = 2048, 65536


@dataclass
class Rest:
    """Of one drafter.

    tokens  whose time it may still lose
    left    steps for which it still rests
    after   drafts that had been made when it woke last
    """

    tokens: float = LOAN
    left: int = 0
    after: int = 0
    _next: int = FIRST_REST

    @property
    def is_due(self) -> bool:
        """Whether it has lost what it may."""
        return self.left <= 0 and self.tokens <= 0

    def gained(self, tokens: float) -> None:
        """It has saved so many tokens' time, or cost it."""
        self.tokens = min(self.tokens + tokens, MOST_CREDIT)
        if self.tokens == MOST_CREDIT:
            self._next = FIRST_REST

    def look(self, steps: int, drafts: int, can_pay: Callable[[], bool], *, is_crowded: bool = False) -> bool:
        """Whether it is awake. So many steps have passed since the last look; `drafts` were made in all;
        `can_pay` says whether they could pay if all were right. is_crowded: so many answers run that few may
        have drafts, which passes, so that a rest for it says nothing of the next."""
        if self.left > 0:
            self.left -= steps
            self.after = drafts
        elif self.is_due or (drafts >= self.after + ENOUGH and not can_pay()):
            self.left = self._next
            if not is_crowded:
                self._next = min(2 * self._next, LAST_REST)
            self.tokens = LOAN
        return self.left <= 0
