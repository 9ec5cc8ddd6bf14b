"""Whose drafts a step computes, and how much of each: by what they promise, and what they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from engine.drafts.acceptance import Acceptance
from engine.drafts.base import FREE, MOST_ROWS, NOTHING, Draft, Drafter, DraftRequest
from engine.drafts.choose import WORTHWHILE, Account, Credit, best_counts
from engine.drafts.step_times import StepTimes
from engine.scheduler import Chunk

# A draft that took longer than so many steps does not pay, or something else kept the machine busy: its
# sequence is not charged with more.
MOST_STEPS = 4.0
PROBED = 2  # drafted tokens when it is only tried
FREE_DRAFTS = [0.0] * (MOST_ROWS + 1)  # seconds that drafts take, by tokens
# Looking for drafts takes this share of the time at most where there are none: after a step without any,
# nobody looks for as many steps as that takes, but for no more than so many.
LOOKING_SHARE, MOST_PAUSE = 0.003, 128


@dataclass
class Opened:
    """What is known of a sequence with a slot."""

    acceptance: Acceptance
    credit: Credit
    drafter: Drafter | None = None  # of the draft in the step under way
    last: Drafter | None = None  # of the draft that was computed last
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
    made            how many were made, by drafter
    made_s, looked_s  seconds that went to drafts that are not free, and to looking drafts up, by drafter,
                    since `begin`
    is_looking_paid  answers whose look-ups gained have paid for one that brought nothing since `begin`
    """

    def __init__(
        self, drafters: Ids[Drafter], times: StepTimes, *, always: int | None, computes_again: bool
    ) -> None:
        self.draft_times = {drafter.name: StepTimes(MOST_ROWS) for drafter in drafters}
        self.made = dict.fromkeys(self.draft_times, 0)
        self.made_s: dict[str, float] = {}
        self.looked_s: dict[str, float] = {}
        self.is_looking_paid = False
        self._began = 0.0
        # Steps in which these look nothing up, but others are asked: nothing better was found.
        self._pauses = dict.fromkeys(FREE, 0)
        self._missed = 0  # times on end that clients' predictions were of no use
        self._times = times
        self._always = always
        self._computes_again = computes_again

    def begin(self) -> None:
        """Nothing was spent yet."""
        self.made_s, self.looked_s = {}, {}
        self.is_looking_paid = False
        self._began = time.perf_counter()

    def expects(self) -> None:
        """There is a new prediction."""
        self._pauses["prediction"] = self._missed = 0

    def passed_over(self, most: int) -> int:
        """Steps, up to `most`, in which nobody would look anything up; they are taken as passed."""
        steps = min(most, *self._pauses.values())
        self._pauses = {name: left - steps for name, left in self._pauses.items()}
        return steps

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
        asked = [drafter for drafter in drafters if not self._pauses.get(drafter.name)]
        self._pauses = {name: max(left - 1, 0) for name, left in self._pauses.items()}
        found = self._candidates(chunks, opened, mosts, asked, tokens)
        is_predicted = any(chunk.sequence.prediction for chunk in chunks)
        if not any(found):
            self._looked_in_vain(opened, tokens, may_rest=is_predicted)
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
        makers = {
            own.drafter.name
            for own, draft in zip(opened, drafts, strict=True)
            if draft.token_ids and own.drafter
        }
        others = any(drafter.name not in FREE for drafter in drafters)
        if makers.isdisjoint(FREE):
            self._looked_in_vain(opened, tokens, may_rest=others or is_predicted)
        elif "prediction" in makers and not any(own.is_probe for own in opened):
            self._missed = 0
        return drafts

    def _looked_in_vain(self, opened: list[Opened], tokens: int, *, may_rest: bool) -> None:
        """Nothing that was looked up is of use in a step of so many tokens. Answers whose look-ups gained pay
        for that; where there is none, nobody looks for some steps if look-ups may rest by themselves."""
        if self._always is not None:
            return
        step_s = self._times.seconds(tokens)
        paying = [own.credit for own in opened if own.credit.pays_looking]
        if paying:
            spent_s = time.perf_counter() - self._began - sum(self.made_s.values()) if self.looked_s else 0.0
            # where it takes longer than some steps, something else kept the machine busy
            cost = min(spent_s / step_s, MOST_STEPS) * len(opened)
            for credit in paying:
                credit.looked(cost / len(paying))
            self.is_looking_paid = True
        elif may_rest:
            self._look_less(step_s)

    def _look_less(self, step_s: float) -> None:
        """What clients predict is looked up again sooner: an answer may come back to it at any place."""
        for name, seconds in self.looked_s.items():
            self._pauses[name] = pause_for(seconds, step_s)
        if "prediction" in self.looked_s:
            self._missed += 1
            self._pauses["prediction"] = min(self._pauses["prediction"], self._missed)

    def _candidates(
        self,
        chunks: list[Chunk],
        opened: list[Opened],
        mosts: list[int],
        drafters: Ids[Drafter],
        tokens: int,
    ) -> list[Candidate | None]:
        """Of each sequence, whose draft promises most."""
        found: list[Candidate | None] = [None] * len(chunks)
        best = [0.0] * len(chunks)
        for drafter in drafters:
            is_free = drafter.name in FREE
            asked = [
                at
                for at, most in enumerate(mosts)
                if most and (self._always is not None or opened[at].credit.is_left(is_free=is_free))
            ]
            drafts: list[Draft | None] = [None] * len(asked)
            if is_free and asked:  # it is asked before it is decided whether that pays
                began = time.perf_counter()
                drafts = list(drafter.draft([_request(chunks[at], mosts[at]) for at in asked]))
                self.looked_s[drafter.name] = time.perf_counter() - began
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
        steps, making = self._times.table(), self._making(drafter) if costs else FREE_DRAFTS
        reached, expected, best = 1.0, 1.0, 0.0
        for count, chance in enumerate(chances, 1):
            if tokens + count > MOST_ROWS:
                break
            reached *= chance
            expected += reached
            rate = expected / (steps[tokens + count] + making[count])
            if rate > best:
                best = rate
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
        are_free = [c is not None and c.drafter.name in FREE for c in found]
        answers = len(opened)
        allowed = [
            self._allowed(chain, own.credit, tokens, answers, is_free=is_free)
            for chain, own, is_free in zip(chains, opened, are_free, strict=True)
        ]

        if not self._times.knows_excess:  # what more tokens cost is a guess so far
            allowed = [chain[:PROBED] for chain in allowed]
        drafting = _nothing if are_made else self._drafting(found)
        again, seconds = self._computes_again, self._times.table().__getitem__
        counts = best_counts(tokens, allowed, room, seconds, drafting, computes_again=again)
        for at, (chain, own) in enumerate(zip(chains, opened, strict=True)):
            if are_made and own.is_probe:  # it is tried whatever it promises
                tried = self._affordable(
                    own.credit.own(is_free=are_free[at]), tokens, answers, min(PROBED, len(chain)), 0.0
                )
                counts[at] = max(1, tried, counts[at])
                continue
            own.is_probe = False
            most = min(PROBED, len(chain), room - sum(counts))
            if not counts[at] and most > 0 and own.credit.is_probe_due(is_free=are_free[at]):
                candidate = found[at]
                assert candidate is not None
                making_s = 0.0 if are_free[at] else self.drafting_s(candidate.drafter, most)
                account = own.credit.own(is_free=are_free[at])
                counts[at] = self._affordable(account, tokens, answers, most, making_s)
                own.is_probe = counts[at] > 0
        return counts

    def _drafting(self, found: list[Candidate | None]) -> Callable[[Ids[int]], float]:
        """Seconds that it takes to make drafts of so many tokens each."""
        making = {
            c.drafter.name: self._making(c.drafter)
            for c in found
            if c is not None and c.drafter.name not in FREE
        }
        if len(making) == len(found) == 1:
            (of_one,) = making.values()
            return lambda counts: of_one[counts[0]]

        def of_all(counts: Ids[int]) -> float:
            longest = dict.fromkeys(making, 0)
            for candidate, count in zip(found, counts, strict=True):
                if candidate is not None and candidate.drafter.name in longest:
                    longest[candidate.drafter.name] = max(longest[candidate.drafter.name], count)
            return sum(making[name][count] for name, count in longest.items())

        return of_all if making else _nothing

    def _allowed(
        self, chain: list[float], credit: Credit, tokens: int, answers: int, *, is_free: bool
    ) -> list[float]:
        """Of what is looked up no more than can be paid for if all is wrong, but for what is tried anyway."""
        if not chain or not credit.is_left(is_free=is_free):
            return []
        if not is_free:
            return chain
        most = min(len(chain), MOST_ROWS - tokens)
        return chain[: max(PROBED, self._affordable(credit.own(is_free=True), tokens, answers, most, 0.0))]

    def _affordable(self, account: Account, tokens: int, answers: int, most: int, making_s: float) -> int:
        """How many drafted tokens, which take so long to make, an answer can pay for if all are wrong. Of a
        step, its token takes the share of one of so many answers."""
        steps = self._times.table()
        limit = (1 + account.tokens / answers) * steps[tokens] - making_s
        return sum(seconds <= limit for seconds in steps[tokens + 1 : tokens + most + 1])

    def can_pay(self, drafter: Drafter, answers: int, most: int) -> bool:
        """Whether a drafter could pay if all its drafts were right, up to `most` tokens for each of so many
        answers."""
        plain = WORTHWHILE * answers / self._times.seconds(min(answers, MOST_ROWS))
        for count in range(1, min(most, drafter.longest) + 1):
            rows = answers * (1 + count)
            if rows > MOST_ROWS:
                return False
            if rows / (self._times.seconds(rows) + self.drafting_s(drafter, count)) > plain:
                return True
        return False

    def drafting_s(self, drafter: Drafter, count: int) -> float:
        """Seconds that a draft of so many tokens takes; 0 where that is not known yet."""
        return self._making(drafter)[count]

    def _making(self, drafter: Drafter) -> list[float]:
        """The same by tokens, from none on."""
        times = self.draft_times[drafter.name]
        if not times.is_known:
            return FREE_DRAFTS
        table = times.table()
        return [0.0, *[table[drafter.longest]] * MOST_ROWS] if drafter.is_whole else [0.0, *table[1:]]

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
            self.made[drafter.name] += 1
            if self.made[drafter.name] > 1:  # the very first one reads everything for the first time
                self.draft_times[drafter.name].observe(_timed_as(drafter, longest), min(took, most_s))
            self.made_s[drafter.name] = took
            for at, draft in zip(wanted, drafts, strict=True):
                chances = opened[at].acceptance.chances(drafter.name, draft)
                made[at] = Candidate(drafter, draft, chances)
        return made


def pause_for(looked_s: float, step_s: float) -> int:
    """Steps that pass until it is worth looking again, where looking took so long and brought nothing."""
    return min(int(looked_s / (LOOKING_SHARE * step_s)), MOST_PAUSE)


def _is_made_whole(drafter: Drafter) -> bool:
    """Whether its drafts cost something, but not more if more of them is asked for."""
    return drafter.is_whole and drafter.name not in FREE


def _timed_as(drafter: Drafter, count: int) -> int:
    """As how many tokens the time of a draft of so many counts."""
    return drafter.longest if drafter.is_whole else count


def _nothing(counts: Ids[int]) -> float:
    """Seconds that drafts take that are made."""
    return 0.0


def _request(chunk: Chunk, most: int) -> DraftRequest:
    return DraftRequest(chunk.sequence.sequence_id, chunk.sequence.token_ids, most)
