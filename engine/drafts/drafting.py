"""Adds drafts to steps, and learns from what became of them.

Every step decides anew, for each sequence, from measured times (step_times.py) and what was accepted before
(acceptance.py), whose draft is computed and how much of it (proposals.py). None at all is an answer: steps
with prompts have none, nor those whose rows are all taken.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Ids
from functools import partial

import torch

from engine.drafts.acceptance import Acceptance, Kind, Tallies
from engine.drafts.base import MOST_ROWS, Draft, Drafter, Rows
from engine.drafts.choose import WORTHWHILE, Credit, account_of_all
from engine.drafts.kept import KeptStates
from engine.drafts.proposals import FREE, MOST_STEPS, Opened, Proposals
from engine.drafts.rests import Rest
from engine.drafts.stats import DrafterStats, DraftStats
from engine.drafts.step_times import MOST, StepTimes
from engine.families.base import Model
from engine.scheduler import Chunk
from engine.sequence import Sequence

logger = logging.getLogger("loci.engine")

# Steps without drafts are measured again after so many with drafts, at first, and at last.
FIRST_CHECK, LAST_CHECK = 8, 128
LOOK_EVERY = 32  # steps, after which it is seen again who can pay at all
# Looking for drafts takes this share of the time at most where there are none: after a step without any,
# nobody looks for as many steps as that takes, but for no more than so many.
LOOKING_SHARE, MOST_PAUSE = 0.005, 64
# Once their times are settled, one of so many steps without drafts is measured.
MEASURED = 4


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
        self._proposals = Proposals(drafters, self._times, always=always, computes_again=kept.computes_again)
        self._of_all: dict[Kind, Tallies] = {}
        self._account = account_of_all()
        self._open: dict[Sequence, Opened] = {}
        self._since_check: dict[int, int] = defaultdict(int)  # steps with drafts, by tokens without
        self._checks: dict[int, int] = defaultdict(lambda: FIRST_CHECK)
        self._spent_s = 0.0  # on the drafts of the step under way
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
            self._open[sequence] = Opened(Acceptance(self._of_all), Credit(self._account))
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
        self._spent_s = self._proposals.made_s = 0.0
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
        opened = [self._open[chunk.sequence] for chunk in chunks]
        awake = [d for d in self._drafters if d.name in FREE or d in self._observing]
        drafts = self._proposals.chosen(chunks, opened, mosts, awake, room)
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
                LOOK_EVERY,
                self._proposals.draft_times[drafter.name].measured,
                partial(self._can_pay, drafter),
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
            took = self._times.seconds(rows) + self._proposals.drafting_s(drafter, count)
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
            steps = self._proposals.made_s / max(self._times.seconds(tokens), 1e-9)
            lost = min(steps, MOST_STEPS)  # by drafts that promised too little
            for chunk in chunks:
                if chunk.sequence in self._open:
                    self._open[chunk.sequence].credit.generated(1 + self._unmeasured)
                    if lost:
                        self._open[chunk.sequence].credit.drafted(-lost)
            self._unmeasured = 0
            self.stats.lost_s += self._proposals.made_s
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

    def _count(self, own: Opened, drafter: Drafter, drafted: int, accepted: int) -> None:
        own.acceptance.add(drafter.name, own.draft, accepted, drafted)
        if own.is_probe:
            own.credit.probed(succeeded=accepted > 0)
        stats = self.stats.by_drafter[drafter.name]
        stats.drafted += drafted
        stats.accepted += accepted
        stats.steps += 1
        stats.lengths[accepted] += 1
