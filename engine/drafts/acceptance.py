"""How likely drafts are accepted: by what happened to those before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.drafts.base import FREE, Draft

# Before anything is known: of a draft's first token, and of those behind accepted ones. Of look-ups, whose
# kind is the length of the match, the first one's chance grows with that.
FIRST_CHANCE, NEXT_CHANCE = 0.6, 0.75
LEAST_CHANCE, BY_LENGTH = 0.15, 0.085
# How many drafts' worth of evidence what is known of all sequences has for one: texts differ most in what can
# be looked up.
PRIOR_DRAFTS, PRIOR_LOOKUPS = 8.0, 3.0
# What remains of older evidence with each draft: of a sequence, and of all.
OF_SEQUENCE, OF_ALL = 0.9, 0.98


@dataclass
class Tally:
    """Drafted tokens that were compared with what the model said, and how many were right; decaying."""

    accepted: float = 0.0
    compared: float = 0.0

    def add(self, accepted: int, compared: int, kept: float) -> None:
        """Take the newest draft."""
        self.accepted = kept * self.accepted + accepted
        self.compared = kept * self.compared + compared

    def chance(self, prior: float, worth: float) -> float:
        """The share that was right, where `prior` was expected, which is worth so many drafts."""
        return (self.accepted + worth * prior) / (self.compared + worth)


@dataclass
class Tallies:
    """Of drafts of one kind: their first tokens, and those behind accepted ones."""

    first: Tally = field(default_factory=Tally)
    following: Tally = field(default_factory=Tally)

    def add(self, accepted: int, drafted: int, kept: float) -> None:
        """Take the newest draft: tokens behind the first one that was wrong were not compared."""
        self.first.add(int(accepted > 0), 1, kept)
        self.following.add(max(accepted - 1, 0), min(accepted, drafted - 1), kept)


Kind = tuple[str, int]  # a drafter's name, and the draft's kind


class Acceptance:
    """What is known of one sequence's drafts, beside what is known of all."""

    def __init__(self, of_all: dict[Kind, Tallies]) -> None:
        self._of_all = of_all
        self._own: dict[Kind, Tallies] = {}

    def add(self, drafter: str, draft: Draft, accepted: int, drafted: int) -> None:
        """Of a draft so many tokens were computed, and so many accepted."""
        kind = drafter, draft.kind
        self._own.setdefault(kind, Tallies()).add(accepted, drafted, OF_SEQUENCE)
        self._of_all.setdefault(kind, Tallies()).add(accepted, drafted, OF_ALL)

    def chances(self, drafter: str, draft: Draft) -> list[float]:
        """Of each token to be accepted if those before it are."""
        known = self._chances(drafter, draft.kind, len(draft.token_ids))
        return known if draft.chances is None else blended(known, draft.chances)

    def expected(self, drafter: str, kind: int, most: int) -> list[float]:
        """The same for a draft that is not made yet."""
        return self._chances(drafter, kind, most)

    def _chances(self, drafter: str, kind: int, count: int) -> list[float]:
        of_all = self._of_all.get((drafter, kind)) or Tallies()
        own = self._own.get((drafter, kind)) or Tallies()
        worth = PRIOR_LOOKUPS if drafter in FREE else PRIOR_DRAFTS
        of_first = of_all.first.chance(_first_chance(drafter, kind), PRIOR_LOOKUPS)
        first = own.first.chance(of_first, worth)
        following = own.following.chance(of_all.following.chance(NEXT_CHANCE, PRIOR_LOOKUPS), worth)
        return [first, *[following] * (count - 1)][:count]


def _first_chance(drafter: str, kind: int) -> float:
    return LEAST_CHANCE + BY_LENGTH * kind if drafter == "lookup" else FIRST_CHANCE


def blended(known: Sequence[float], said: Sequence[float]) -> list[float]:
    """What the drafter says, made more or less confident by how much of that came true."""
    return [min(0.99, (a + 3 * b) / 4) for a, b in zip(known, said, strict=True)]
