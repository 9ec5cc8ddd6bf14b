"""Whose drafts a step computes, and how much of each: by what they promise, and what they take."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from engine.drafts.acceptance import Acceptance
from engine.drafts.base import MOST_ROWS, NOTHING, Draft, Drafter, DraftRequest
from engine.drafts.choose import Credit, best_counts
from engine.drafts.step_times import StepTimes
from engine.scheduler import Chunk

# Drafts that cost nothing are asked for before it is decided whether they pay.
FREE = ("prediction", "lookup")
# A draft that took longer than so many steps does not pay, or something else kept the machine busy: its
# sequence is not charged with more.
MOST_STEPS = 4.0
PROBED = 2  # drafted tokens when it is only tried


@dataclass
class Opened:
    """What is known of a sequence with a slot."""

    acceptance: Acceptance
    credit: Credit
    drafter: Drafter | None = None  # of the draft in the step under way
    draft: Draft = NOTHING
    is_probe: bool = False
    told: int = 0  # tokens from the first on that drafters were told of


@dataclass
class Candidate:
    """Who could draft for a sequence, and how well that is expected to go."""

    drafter: Drafter
    draft: Draft | None  # None: it is not made yet
    chances: list[float]


class Proposals:
    """Drafts for the sequences of a step.

    times           what steps take
    always          draft so many tokens wherever there are any, whether or not it pays: for tests
    computes_again  a draft that is not accepted has the step's other tokens computed again
    draft_times     what drafts take, by drafter
    made_s          seconds that went to drafts that are not free, since somebody set it to 0
    """

    def __init__(
        self, drafters: Ids[Drafter], times: StepTimes, *, always: int | None, computes_again: bool
    ) -> None:
        self.draft_times = {drafter.name: StepTimes(MOST_ROWS) for drafter in drafters}
        self.made_s = 0.0
        self._times = times
        self._always = always
        self._computes_again = computes_again

    def chosen(
        self,
        chunks: list[Chunk],
        opened: list[Opened],
        mosts: list[int],
        drafters: Ids[Drafter],
        room: int,
    ) -> list[Draft]:
        """A draft for each chunk, none where it does not pay; `opened` then says whose it is.

        mosts     drafted tokens of each chunk
        drafters  who may be asked
        room      drafted tokens of all
        """
        tokens = sum(chunk.length for chunk in chunks)
        found = self._candidates(chunks, opened, mosts, drafters, tokens)
        if not any(found):
            return [NOTHING] * len(chunks)
        counts = self._counts(found, opened, mosts, tokens, room)
        found = self._made(chunks, opened, found, counts, mosts, drafters)
        if any(c is not None and c.draft is not None and c.draft.chances is not None for c in found):
            again = self._counts(found, opened, mosts, tokens, room, are_made=True)
            for at, (candidate, more) in enumerate(zip(found, again, strict=True)):
                is_there = candidate is not None and _is_made_whole(candidate.drafter) and counts[at] > 0
                counts[at] = min(more if is_there else min(counts[at], more), room)
                room -= counts[at]
        drafts = [NOTHING] * len(chunks)
        for at, (own, candidate, count) in enumerate(zip(opened, found, counts, strict=True)):
            if candidate is not None and candidate.draft is not None and count:
                own.drafter, own.draft = candidate.drafter, candidate.draft
                drafts[at] = own.draft._replace(token_ids=own.draft.token_ids[:count])
        return drafts

    def _candidates(
        self,
        chunks: list[Chunk],
        opened: list[Opened],
        mosts: list[int],
        drafters: Ids[Drafter],
        tokens: int,
    ) -> list[Candidate | None]:
        """Of each sequence, whose draft promises most."""
        asked = [at for at, most in enumerate(mosts) if most]
        found: list[Candidate | None] = [None] * len(chunks)
        best = [0.0] * len(chunks)
        for drafter in drafters:
            drafts: list[Draft | None] = [None] * len(asked)
            if drafter.name in FREE:
                drafts = list(drafter.draft([_request(chunks[at], mosts[at]) for at in asked]))
            for at, draft in zip(asked, drafts, strict=True):
                known = opened[at].acceptance
                if draft is None:
                    count = min(mosts[at], drafter.longest)
                    chances = known.expected(drafter.name, 0, count)
                elif draft.token_ids:
                    chances = known.chances(drafter.name, draft)
                else:
                    continue
                promised = self._promised(drafter, chances, draft is None, tokens)
                if promised > best[at]:
                    best[at], found[at] = promised, Candidate(drafter, draft, chances)
        return found

    def _promised(self, drafter: Drafter, chances: list[float], costs: bool, tokens: int) -> float:
        """The most tokens a second that a sequence by itself would have with this drafter."""
        reached, expected, best = 1.0, 1.0, 0.0
        for count, chance in enumerate(chances, 1):
            reached *= chance
            expected += reached
            seconds = self._times.seconds(min(tokens + count, MOST_ROWS))
            best = max(best, expected / (seconds + (self.drafting_s(drafter, count) if costs else 0.0)))
        return best

    def _counts(
        self,
        found: list[Candidate | None],
        opened: list[Opened],
        mosts: list[int],
        tokens: int,
        room: int,
        *,
        are_made: bool = False,
    ) -> list[int]:
        """How many tokens of each draft are computed. are_made: making them costs nothing any more."""
        chains = [[] if c is None else c.chances[:most] for c, most in zip(found, mosts, strict=True)]
        if self._always is not None:
            counts = []
            for chain in chains:
                counts.append(min(len(chain), self._always, room))
                room -= counts[-1]
            return counts
        allowed = [chain if o.credit.is_left else [] for chain, o in zip(chains, opened, strict=True)]

        def drafting(counts: Ids[int]) -> float:
            if are_made:
                return 0.0
            longest: dict[str, int] = {}
            by_name: dict[str, Drafter] = {}
            for candidate, count in zip(found, counts, strict=True):
                if candidate is not None and candidate.drafter.name not in FREE and count:
                    name = candidate.drafter.name
                    by_name[name], longest[name] = candidate.drafter, max(longest.get(name, 0), count)
            return sum(self.drafting_s(by_name[name], count) for name, count in longest.items())

        if not self._times.knows_excess:  # what more tokens cost is a guess so far
            allowed = [chain[:PROBED] for chain in allowed]
        counts = best_counts(
            tokens, allowed, room, self._times.seconds, drafting, computes_again=self._computes_again
        )
        for at, (chain, own) in enumerate(zip(chains, opened, strict=True)):
            if are_made and own.is_probe:  # it is tried whatever it promises
                tried = self._affordable(own.credit, tokens, min(PROBED, len(chain)))
                counts[at] = max(1, tried, counts[at])
                continue
            own.is_probe = False
            most = min(PROBED, len(chain), room - sum(counts))
            if not counts[at] and most > 0 and own.credit.is_probe_due():
                counts[at] = self._affordable(own.credit, tokens, most)
                own.is_probe = counts[at] > 0
        return counts

    def _affordable(self, credit: Credit, tokens: int, most: int) -> int:
        """How many drafted tokens a sequence can pay for if all are wrong."""
        plain = self._times.seconds(tokens)
        costs = (self._times.seconds(tokens + count) / plain - 1 for count in range(1, most + 1))
        return sum(cost <= credit.own.tokens for cost in costs)

    def drafting_s(self, drafter: Drafter, count: int) -> float:
        """Seconds that a draft of so many tokens takes; 0 where that is not known yet."""
        times = self.draft_times[drafter.name]
        return times.seconds(_timed_as(drafter, count)) if times.is_known else 0.0

    def _made(
        self,
        chunks: list[Chunk],
        opened: list[Opened],
        found: list[Candidate | None],
        counts: list[int],
        mosts: list[int],
        drafters: Ids[Drafter],
    ) -> list[Candidate | None]:
        """The candidates whose drafts are computed, with drafts: whole ones where that takes no longer."""
        made = list(found)
        for drafter in drafters:
            wanted = [
                at
                for at, (candidate, count) in enumerate(zip(found, counts, strict=True))
                if candidate is not None
                and candidate.draft is None
                and count
                and candidate.drafter is drafter
            ]
            if not wanted:
                continue
            began = time.perf_counter()
            asked = mosts if _is_made_whole(drafter) else counts
            drafts = drafter.draft([_request(chunks[at], asked[at]) for at in wanted])
            longest, took = max(counts[at] for at in wanted), time.perf_counter() - began
            most_s = MOST_STEPS * self._times.seconds(len(chunks))
            self.draft_times[drafter.name].observe(_timed_as(drafter, longest), min(took, most_s))
            self.made_s += took
            for at, draft in zip(wanted, drafts, strict=True):
                chances = opened[at].acceptance.chances(drafter.name, draft)
                made[at] = Candidate(drafter, draft, chances)
        return made


def _is_made_whole(drafter: Drafter) -> bool:
    """Whether its drafts cost something, but not more if more of them is asked for."""
    return drafter.is_whole and drafter.name not in FREE


def _timed_as(drafter: Drafter, count: int) -> int:
    """As how many tokens the time of a draft of so many counts."""
    return drafter.longest if drafter.is_whole else count


def _request(chunk: Chunk, most: int) -> DraftRequest:
    return DraftRequest(chunk.sequence.sequence_id, chunk.sequence.token_ids, most)
