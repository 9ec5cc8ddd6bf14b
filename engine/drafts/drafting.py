"""Adds drafts to steps, and learns from what became of them.

Every step decides anew, for each sequence, from measured times (step_times.py) and what was accepted before
(acceptance.py), whose draft is computed and how much of it (choose.py). None at all is an answer: steps with
prompts have none, nor those whose rows are all taken.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from functools import partial

import torch

from engine.drafts.acceptance import Acceptance, Kind, Tallies
from engine.drafts.base import NOTHING, Draft, Drafter, DraftRequest, Rows
from engine.drafts.choose import WORTHWHILE, Credit, account_of_all, best_counts
from engine.drafts.kept import KeptStates
from engine.drafts.rests import Rest
from engine.drafts.step_times import MOST, StepTimes
from engine.families.base import Model
from engine.scheduler import Chunk
from engine.sequence import Sequence

logger = logging.getLogger("loci.engine")

MOST_ROWS = 16  # of a step with drafts: those of a recorded one
# Drafts that cost nothing are asked for before it is decided whether they pay.
FREE = ("prediction", "lookup")
# Steps without drafts are measured again after so many with drafts, at first, and at last.
FIRST_CHECK, LAST_CHECK = 8, 128
# A draft that took longer than so many steps does not pay, or something else kept the machine busy: its
# sequence is not charged with more.
MOST_STEPS = 4.0
PROBED = 2  # drafted tokens when it is only tried
LOOK_EVERY = 32  # steps, after which it is seen again who can pay at all
# Looking for drafts takes this share of the time at most where there are none: after a step without any,
# nobody looks for as many steps as that takes, but for no more than so many.
LOOKING_SHARE, MOST_PAUSE = 0.005, 64
# Once their times are settled, one of so many steps without drafts is measured.
MEASURED = 4


@dataclass
class DrafterStats:
    """Tokens of one drafter: drafted and computed, and accepted of these; `steps` had any of them.

    lengths  how often so many tokens were accepted, from none on
    """

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * MOST_ROWS)


@dataclass
class DraftStats:
    """What drafts have done so far.

    drafting_s   spent on drafts themselves
    gained_s, lost_s  of steps with drafts, against steps without for as many tokens: those that gained, and
                 those that lost
    """

    by_drafter: dict[str, DrafterStats] = field(default_factory=dict)
    drafting_s: float = 0.0
    gained_s: float = 0.0
    lost_s: float = 0.0


@dataclass
class _Open:
    """What is known of a sequence with a slot."""

    acceptance: Acceptance
    credit: Credit
    drafter: Drafter | None = None  # of the draft in the step under way
    draft: Draft = NOTHING
    is_probe: bool = False
    told: int = 0  # tokens from the first on that drafters were told of


@dataclass
class _Candidate:
    """Who could draft for a sequence, and how well that is expected to go."""

    drafter: Drafter
    draft: Draft | None  # None: it is not made yet
    chances: list[float]


class Drafting:
    """Drafts of an engine's sequences.

    drafters  those that are asked, in the order of preference where they promise as much
    kept      takes back what was computed for nothing
    most      drafted tokens of a sequence in a step
    always    draft so many tokens wherever there are any, whether or not it pays: for tests
    guess     what a step of several tokens probably costs (`StepTimes`)
    """

    def __init__(
        self,
        model: Model,
        drafters: Ids[Drafter],
        kept: KeptStates,
        most: int,
        *,
        always: int | None = None,
        guess: Callable[[int], float] | None = None,
    ) -> None:
        self.stats = DraftStats({drafter.name: DrafterStats() for drafter in drafters})
        self._model = model
        self._drafters = list(drafters)
        self._kept = kept
        self._most = most
        self._always = always
        self._times = StepTimes(MOST_ROWS, guess)
        self._draft_times = {drafter.name: StepTimes(MOST_ROWS) for drafter in drafters}
        self._of_all: dict[Kind, Tallies] = {}
        self._account = account_of_all()
        self._open: dict[Sequence, _Open] = {}
        self._since_check: dict[int, int] = defaultdict(int)  # steps with drafts, by tokens without
        self._checks: dict[int, int] = defaultdict(lambda: FIRST_CHECK)
        self._spent_s = 0.0  # on the drafts of the step under way
        self._made_s = 0.0  # of that, on making drafts that are not free
        self._watching = [drafter for drafter in drafters if drafter.name not in FREE]
        self._observing = self._watching  # those that are not at rest
        self._rests = {drafter.name: Rest() for drafter in self._watching}
        self._pause = 0  # steps in which nobody looks for drafts
        self._unmeasured = 0  # steps since one without drafts was measured
        self._wants_captures = any(drafter.wants_captures for drafter in drafters)
        self._until_look = LOOK_EVERY

    @property
    def is_on(self) -> bool:
        """Whether there is anybody to draft."""
        return bool(self.stats.by_drafter)

    # -------------------------------------------------------------------------------------- sequences

    def open(self, sequence: Sequence) -> None:
        """A sequence has a slot."""
        if self._drafters:
            self._open[sequence] = _Open(Acceptance(self._of_all), Credit(self._account))
            if sequence.prediction:
                self._pause = 0
            for drafter in self._drafters:
                drafter.open(sequence.sequence_id, sequence.token_ids, sequence.prediction)

    def close(self, sequence: Sequence) -> None:
        """It has none any more. `sequence.slot` still says which one it was."""
        if self._open.pop(sequence, None) is not None:
            for drafter in self._drafters:
                drafter.close(sequence.sequence_id)
            if sequence.slot is not None:
                self._kept.drop(sequence.slot)

    # ------------------------------------------------------------------------------------- before a step

    def propose(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks of a step, with drafts where these pay. A drafter that fails costs no answer."""
        try:
            return self._proposed(chunks)
        except Exception as error:
            self._give_up(error)
            return chunks

    def _give_up(self, error: Exception) -> None:
        """A drafter failed, and what it knows may be half done: there are no drafts from now on."""
        logger.error("a drafter failed; nothing is drafted any more", exc_info=error)
        self._drafters, self._watching, self._observing = [], [], []
        self._wants_captures = False

    def _proposed(self, chunks: list[Chunk]) -> list[Chunk]:
        self._spent_s = self._made_s = 0.0
        if self._watching and self._always is None:
            self._rest()
        if self._pause:
            self._pause -= 1
            return chunks
        if not self._drafters or any(chunk.sequence.is_prefilling for chunk in chunks):
            return chunks
        tokens = sum(chunk.length for chunk in chunks)
        room = MOST_ROWS - tokens
        if room < 1 or not chunks or not self._times.is_known or self._is_check_due(tokens):
            return chunks
        began = time.perf_counter()
        mosts = [self._most_of(chunk.sequence, room) for chunk in chunks]
        if not any(mosts):
            return chunks
        drafts = self._chosen(chunks, mosts, tokens, room)
        self._spent_s = time.perf_counter() - began
        if not any(draft.token_ids for draft in drafts):
            if self._always is None and not any(chunk.sequence.prediction for chunk in chunks):
                steps = self._spent_s / (LOOKING_SHARE * self._times.seconds(tokens))
                self._pause = min(int(steps), MOST_PAUSE)
            return chunks
        return [self._with_draft(chunk, draft) for chunk, draft in zip(chunks, drafts, strict=True)]

    def _rest(self) -> None:
        """Now and then, see who rests."""
        self._until_look -= 1
        if self._until_look > 0:
            return
        self._until_look = LOOK_EVERY
        self._observing = [
            drafter
            for drafter in self._watching
            if self._rests[drafter.name].look(
                LOOK_EVERY, self._draft_times[drafter.name].measured, partial(self._can_pay, drafter)
            )
        ]
        if not self._account.is_left:  # nobody may draft, so that nobody needs to be told anything
            self._observing = []
        self._wants_captures = any(drafter.wants_captures for drafter in self._observing)

    def _can_pay(self, drafter: Drafter) -> bool:
        answers = max(1, len(self._open))
        plain = WORTHWHILE * answers / self._times.seconds(min(answers, MOST_ROWS))
        for count in range(1, min(self._most, drafter.longest) + 1):
            rows = answers * (1 + count)
            if rows > MOST_ROWS:
                return False
            took = self._times.seconds(rows) + self._drafting_s(drafter, count)
            if rows / took > plain:
                return True
        return False

    def _most_of(self, sequence: Sequence, room: int) -> int:
        """Tokens that may be drafted: a step makes one more than are accepted."""
        return max(0, min(self._most, room, sequence.max_tokens - sequence.generated - 1))

    def _is_check_due(self, tokens: int) -> bool:
        """Whether a step is to have no drafts, so that it is known how long it takes."""
        if self._always is not None or self._since_check[tokens] < self._checks[tokens]:
            return False
        self._checks[tokens] = min(2 * self._checks[tokens], LAST_CHECK)
        return True

    def _chosen(self, chunks: list[Chunk], mosts: list[int], tokens: int, room: int) -> list[Draft]:
        """A draft for each chunk, none where it does not pay."""
        found = self._candidates(chunks, mosts, tokens)
        if not any(found):
            return [NOTHING] * len(chunks)
        counts = self._counts(found, chunks, mosts, tokens, room)
        found = self._made(chunks, found, counts, mosts)
        if any(c is not None and c.draft is not None and c.draft.chances is not None for c in found):
            again = self._counts(found, chunks, mosts, tokens, room, are_made=True)
            for at, (candidate, more) in enumerate(zip(found, again, strict=True)):
                is_there = candidate is not None and _is_made_whole(candidate.drafter) and counts[at] > 0
                counts[at] = min(more if is_there else min(counts[at], more), room)
                room -= counts[at]
        drafts = [NOTHING] * len(chunks)
        for at, (chunk, candidate, count) in enumerate(zip(chunks, found, counts, strict=True)):
            if candidate is not None and candidate.draft is not None and count:
                draft = candidate.draft
                self._open[chunk.sequence].drafter, self._open[chunk.sequence].draft = (
                    candidate.drafter,
                    draft,
                )
                drafts[at] = draft._replace(token_ids=draft.token_ids[:count])
        return drafts

    def _candidates(self, chunks: list[Chunk], mosts: list[int], tokens: int) -> list[_Candidate | None]:
        """Of each sequence, whose draft promises most."""
        asked = [at for at, most in enumerate(mosts) if most]
        found: list[_Candidate | None] = [None] * len(chunks)
        best = [0.0] * len(chunks)
        for drafter in self._drafters:
            if drafter.name not in FREE and drafter not in self._observing:
                continue
            drafts: list[Draft | None] = [None] * len(asked)
            if drafter.name in FREE:
                drafts = list(drafter.draft([_request(chunks[at], mosts[at]) for at in asked]))
            for at, draft in zip(asked, drafts, strict=True):
                known = self._open[chunks[at].sequence].acceptance
                if draft is None:
                    count = min(mosts[at], drafter.longest)
                    chances = known.expected(drafter.name, 0, count)
                elif draft.token_ids:
                    chances = known.chances(drafter.name, draft)
                else:
                    continue
                promised = self._promised(drafter, chances, draft is None, tokens)
                if promised > best[at]:
                    best[at], found[at] = promised, _Candidate(drafter, draft, chances)
        return found

    def _promised(self, drafter: Drafter, chances: list[float], costs: bool, tokens: int) -> float:
        """The most tokens a second that a sequence by itself would have with this drafter."""
        reached, expected, best = 1.0, 1.0, 0.0
        for count, chance in enumerate(chances, 1):
            reached *= chance
            expected += reached
            seconds = self._times.seconds(min(tokens + count, MOST_ROWS))
            best = max(best, expected / (seconds + (self._drafting_s(drafter, count) if costs else 0.0)))
        return best

    def _counts(
        self,
        found: list[_Candidate | None],
        chunks: list[Chunk],
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
        opened = [self._open[chunk.sequence] for chunk in chunks]
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
            return sum(self._drafting_s(by_name[name], count) for name, count in longest.items())

        if not self._times.knows_excess:  # what more tokens cost is a guess so far
            allowed = [chain[:PROBED] for chain in allowed]
        again = self._kept.computes_again
        counts = best_counts(tokens, allowed, room, self._times.seconds, drafting, computes_again=again)
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

    def _drafting_s(self, drafter: Drafter, count: int) -> float:
        times = self._draft_times[drafter.name]
        return times.seconds(_timed_as(drafter, count)) if times.is_known else 0.0

    def _made(
        self, chunks: list[Chunk], found: list[_Candidate | None], counts: list[int], mosts: list[int]
    ) -> list[_Candidate | None]:
        """The candidates whose drafts are computed, with drafts: whole ones where that takes no longer."""
        made = list(found)
        for drafter in self._drafters:
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
            self._draft_times[drafter.name].observe(_timed_as(drafter, longest), min(took, most_s))
            self._made_s += took
            for at, draft in zip(wanted, drafts, strict=True):
                chances = self._open[chunks[at].sequence].acceptance.chances(drafter.name, draft)
                made[at] = _Candidate(drafter, draft, chances)
        return made

    def _with_draft(self, chunk: Chunk, draft: Draft) -> Chunk:
        sequence, token_ids = chunk.sequence, draft.token_ids
        assert sequence.slot is not None
        if not token_ids or not self._kept.keep(sequence.slot):
            self._open[sequence].drafter = None
            return chunk
        before = sequence.token_ids[-MOST_ROWS:]
        self._model.expect([([*before, *token_ids[:at]], token) for at, token in enumerate(token_ids)])
        drafter = self._open[sequence].drafter
        is_predicted = drafter is not None and drafter.name == "prediction"
        return Chunk(sequence, chunk.length + len(token_ids), token_ids, is_predicted)

    # ------------------------------------------------------------------------------------- behind a step

    def roll_back(self, sequence: Sequence, length: int) -> int:
        """Take the sequence's slot back to `length` tokens, or fewer; how many are left."""
        assert sequence.slot is not None
        return self._kept.roll_back(sequence.slot, length)

    def captured(self) -> list[torch.Tensor | None]:
        """What the last forward has captured of each of its chunks, where somebody wants it."""
        return list(self._model.captured()) if self._wants_captures else []

    def observe(self, chunks: Ids[Chunk], starts: Ids[int], captures: Ids[torch.Tensor | None]) -> None:
        """A step has computed these chunks from `starts` on; their sequences say what is kept of them."""
        if not self._observing:
            return
        rows = []
        for number, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
            sequence = chunk.sequence
            own = self._open.get(sequence)
            if own is None:
                continue
            stop = min(start + chunk.length, max(sequence.computed, len(sequence.token_ids) - 1))
            taken = captures[number] if captures else None
            if taken is not None and stop < start + chunk.length:
                taken = taken[: max(len(taken) - (start + chunk.length - stop), 0)]
            again = max(own.told - start, 0)  # taken back, and computed once more
            own.told, first = stop, start + again
            taken = None if taken is None else taken[again:]
            rows.append(Rows(sequence.sequence_id, first, sequence.token_ids[first:stop], taken))
        try:
            for drafter in self._observing:
                drafter.observe(rows)
        except Exception as error:
            self._give_up(error)

    def learn(self, chunks: Ids[Chunk], accepted: Ids[int], seconds: float) -> None:
        """Of these chunks' drafts so many tokens were accepted, in a step without prompts that took so long,
        drafting included."""
        if not self._drafters or not chunks:
            return
        tokens = sum(chunk.length for chunk in chunks)
        is_plain = tokens == len(chunks)
        if (
            is_plain
            and not self._spent_s
            and self._unmeasured < MEASURED - 1
            and self._times.is_settled(tokens)
            and not self._since_check[tokens]
        ):
            self._unmeasured += 1
            return
        plain = sum(chunk.known for chunk in chunks)
        seconds -= self._spent_s
        self._times.observe(tokens, seconds)
        self.stats.drafting_s += self._spent_s
        if not self._times.is_known or tokens > MOST_ROWS:
            return
        if is_plain:
            self._since_check[plain] = 0
            steps = self._made_s / max(self._times.seconds(tokens), 1e-9)
            lost = min(steps, MOST_STEPS)  # by drafts that promised too little
            for chunk in chunks:
                if chunk.sequence in self._open:
                    self._open[chunk.sequence].credit.generated(1 + self._unmeasured)
                    if lost:
                        self._open[chunk.sequence].credit.drafted(-lost)
            self._unmeasured = 0
            self.stats.lost_s += self._made_s
            return
        self._since_check[plain] = 0 if tokens == plain else self._since_check[plain] + 1
        count_s, more = self._times.seconds(len(chunks)), tokens - len(chunks)
        took_s = min(seconds, MOST * self._times.seconds(tokens)) + min(self._spent_s, MOST_STEPS * count_s)
        each_s, gained_s = count_s / len(chunks), count_s - took_s
        for chunk, count in zip(chunks, accepted, strict=True):
            own = self._open.get(chunk.sequence)
            share = (chunk.length - 1) / more
            gained_s += count * each_s
            if own is None:
                continue
            own.credit.generated(1 + count)
            if chunk.length > 1:
                own.credit.drafted(count + share * (count_s - took_s) / each_s)
            if chunk.drafted and own.drafter is not None:
                self._count(own, own.drafter, len(chunk.drafted), count)
                own.drafter = None
        self.stats.gained_s += max(gained_s, 0.0)
        self.stats.lost_s -= min(gained_s, 0.0)

    def _count(self, own: _Open, drafter: Drafter, drafted: int, accepted: int) -> None:
        own.acceptance.add(drafter.name, own.draft, accepted, drafted)
        if own.is_probe:
            own.credit.probed(succeeded=accepted > 0)
        stats = self.stats.by_drafter[drafter.name]
        stats.drafted += drafted
        stats.accepted += accepted
        stats.steps += 1
        stats.lengths[accepted] += 1


def _is_made_whole(drafter: Drafter) -> bool:
    """Whether its drafts cost something, but not more if more of them is asked for."""
    return drafter.is_whole and drafter.name not in FREE


def _timed_as(drafter: Drafter, count: int) -> int:
    """As how many tokens the time of a draft of so many counts."""
    return drafter.longest if drafter.is_whole else count


def _request(chunk: Chunk, most: int) -> DraftRequest:
    return DraftRequest(chunk.sequence.sequence_id, chunk.sequence.token_ids, most)
