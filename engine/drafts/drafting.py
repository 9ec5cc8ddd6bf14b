"""Adds drafts to steps, and learns from what became of them.

Every step decides anew, for each sequence, from measured times (step_times.py) and what was accepted before
(acceptance.py), whose draft is computed and how much of it (proposals.py). None at all is an answer: steps
with prompts have none, nor those whose rows are all taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from functools import partial

import torch

from engine.drafts.acceptance import Acceptance, Kind, Tallies
from engine.drafts.base import FREE, MOST_ROWS, Draft, Drafter, Rows
from engine.drafts.checks import Checks
from engine.drafts.choose import Credit, Tries, account_of_all
from engine.drafts.costs import Costs
from engine.drafts.kept import KeptStates
from engine.drafts.proposals import MOST_PAUSE, MOST_STEPS, Opened, Proposals, pause_for
from engine.drafts.rests import SURE, Rest
from engine.drafts.stats import DrafterStats, DraftStats
from engine.drafts.step_times import COLD, MOST, StepTimes
from engine.families.base import Model
from engine.scheduler import Chunk
from engine.sequence import Sequence

logger = logging.getLogger("loci.engine")

LOOK_EVERY = 32  # steps, after which it is seen again who can pay at all
AWAKE_PAUSE = 2  # steps in which drafters that do not rest are asked nothing: they promised too little
# Once their times are settled, one of so many steps without drafts is measured.
MEASURED = 16


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
        self._account, self._tries = account_of_all(), Tries()
        self._open: dict[Sequence, Opened] = {}
        self._checks = Checks()
        self._spent_s = 0.0  # on the drafts of the step under way, and for those of later ones
        self._proposed_s = 0.0  # on its own drafts
        self._costs = Costs()  # of drafters that are not at rest
        self._watching = [drafter for drafter in drafters if drafter.name not in FREE]
        self._observing = self._watching  # those that are not at rest
        self._rests = {drafter.name: Rest() for drafter in self._watching}
        self._pause = 0  # steps in which nobody looks for drafts
        self._unmeasured = 0  # steps since one without drafts was measured
        self._drafted_steps = 0  # that had drafts
        self._is_behind_drafts = False  # the step before had some
        self._quiet = 0  # steps in which nobody does anything, as if there were no drafts
        self._is_quiet = False  # the step under way
        self._wants_captures = any(drafter.wants_captures for drafter in drafters)
        self._since_look = 0

    @property
    def is_on(self) -> bool:
        """Whether there is anybody to draft."""
        return bool(self.stats.by_drafter)

    # -------------------------------------------------------------------------------------- sequences

    def open(self, sequence: Sequence) -> None:
        """A sequence has a slot."""
        if self._drafters:
            credit = Credit(self._account, self._tries)
            self._open[sequence] = Opened(Acceptance(self._of_all), credit)
            if sequence.prediction:
                self._pause = self._quiet = 0
                self._proposals.expects()
            for drafter in self._drafters:
                drafter.open(sequence.sequence_id, sequence.token_ids, sequence.prediction)

    def close(self, sequence: Sequence) -> None:
        """It has none any more. `sequence.slot` still says which one it was."""
        if self._open.pop(sequence, None) is not None:
            self._costs.close(sequence)
            for drafter in self._drafters:
                drafter.close(sequence.sequence_id)
            if sequence.slot is not None:
                self._kept.drop(sequence.slot)

    # ------------------------------------------------------------------------------------- before a step

    def propose(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks of a step, with drafts where these pay. A drafter that fails costs no answer."""
        self._is_quiet = self._quiet > 0
        if self._is_quiet:
            self._quiet -= 1
            return chunks
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
        self._spent_s = self._proposed_s = 0.0
        self.stats.lost_s += self._costs.put_off()
        if self._watching and self._always is None:
            self._since_look += 1
            if self._since_look >= LOOK_EVERY:
                self._rest()
        if self._pause:
            self._pause -= 1
            if not self._observing and self._times.is_settled(len(chunks)):
                left = MEASURED - self._unmeasured
                if self._watching:
                    left = min(left, LOOK_EVERY - self._since_look)
                self._quiet = max(0, min(self._pause, left - 1))
                self._pause -= self._quiet
                self._since_look += self._quiet if self._watching else 0
            return chunks
        if not self._drafters or any(chunk.sequence.is_prefilling for chunk in chunks):
            return chunks
        tokens = sum(chunk.length for chunk in chunks)
        room = MOST_ROWS - tokens
        known = self._times.measured >= (COLD if self._always is None else 1)
        if room < 1 or not chunks or not known:
            return chunks
        if self._always is None and self._checks.is_due(tokens):
            return chunks
        began = time.perf_counter()
        self._proposals.begin()
        mosts = [self._most_of(chunk.sequence, room) for chunk in chunks]
        if not any(mosts):
            return chunks
        opened = [self._open[chunk.sequence] for chunk in chunks]
        awake = [d for d in self._drafters if d.name in FREE or d in self._observing]
        drafts = self._proposals.chosen(chunks, opened, mosts, awake, room)
        self._spent_s = self._proposed_s = time.perf_counter() - began
        if not any(draft.token_ids for draft in drafts):
            if self._always is None and not self._proposals.is_looking_paid:
                most = AWAKE_PAUSE if self._observing else MOST_PAUSE
                if any(chunk.sequence.prediction for chunk in chunks):
                    self._pause = self._proposals.passed_over(most)
                else:
                    self._pause = min(pause_for(self._spent_s, self._times.seconds(tokens)), most)
            return chunks
        return [self._with_draft(chunk, draft) for chunk, draft in zip(chunks, drafts, strict=True)]

    def _rest(self) -> None:
        """See who rests."""
        steps, self._since_look = self._since_look, 0
        answers = sum(not sequence.is_prefilling for sequence in self._open)
        drafted = max(1, min(answers, MOST_ROWS // 2))  # of more, some would have drafts all the same
        self._observing = [
            drafter
            for drafter in self._watching
            if self._rests[drafter.name].look(
                steps,
                self._proposals.made[drafter.name],
                partial(self._proposals.can_pay, drafter, drafted, self._most),
                is_crowded=answers > MOST_ROWS // 2,
            )
        ]
        self._costs.forgive([drafter for drafter in self._watching if drafter not in self._observing])
        self._wants_captures = any(drafter.wants_captures for drafter in self._observing)

    def _most_of(self, sequence: Sequence, room: int) -> int:
        """Tokens that may be drafted: a step makes one more than are accepted."""
        return max(0, min(self._most, room, sequence.max_tokens - sequence.generated - 1))

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
        if not self._wants_captures:
            self._model.drop_captured()
            return []
        began = time.perf_counter()
        found: list[torch.Tensor | None] = list(self._model.captured())
        self._model.drop_captured()
        self._spend([drafter for drafter in self._observing if drafter.wants_captures], began)
        return found

    def observe(self, chunks: Ids[Chunk], starts: Ids[int], captures: Ids[torch.Tensor | None]) -> None:
        """A step has computed these chunks from `starts` on; their sequences say what is kept of them."""
        if not self._observing:
            return
        began = time.perf_counter()
        rows, told = [], {}
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
            told[sequence] = chunk.length
        self._costs.told(told)
        began = self._spend(self._observing, began)
        try:
            for drafter in self._observing:
                drafter.observe(rows)
                began = self._spend([drafter], began)
        except Exception as error:
            self._give_up(error)

    def _spend(self, drafters: Ids[Drafter], began: float) -> float:
        """Since then, what these want to know was put together, or told; what time it is now."""
        now = time.perf_counter()
        self._spent_s += now - began
        self._costs.spent(drafters, now - began)
        return now

    def learn(self, chunks: Ids[Chunk], accepted: Ids[int], brought: Ids[int], seconds: float) -> None:
        """Of these chunks' drafts so many tokens were accepted, in a step without prompts that took so long,
        drafting included; it brought each answer so many tokens more than one without drafts. These are as
        many as were accepted, or one less where an answer has ended in a draft."""
        if self._is_quiet:
            self._unmeasured += 1
            return
        if not self._drafters or not chunks:
            return
        tokens = chunks[0].length if len(chunks) == 1 else sum(chunk.length for chunk in chunks)
        is_plain = tokens == len(chunks)
        if (
            is_plain
            and not self._spent_s
            and self._unmeasured < MEASURED - 1
            and self._times.is_settled(tokens)
            and self._checks.is_fresh(tokens)
        ):
            self._unmeasured += 1
            return
        began = time.perf_counter()
        seconds -= self._spent_s
        self.stats.drafting_s += self._spent_s
        if tokens <= MOST_ROWS:
            self._drafted_steps += not is_plain
            # The first steps with drafts touch what no step has touched before.
            if not self._is_behind_drafts if is_plain else self._drafted_steps > SURE:
                self._times.observe(tokens, seconds)
            self._is_behind_drafts = not is_plain
            if is_plain:
                self._learn_plain(chunks)
            else:
                self._learn_drafted(chunks, accepted, brought, seconds)
            seconds = self._times.seconds(len(chunks))
        if self._observing:
            self._costs.spent(self._observing, time.perf_counter() - began)
            self._settle(chunks, seconds / len(chunks))

    def _learn_plain(self, chunks: Ids[Chunk]) -> None:
        """Nothing was drafted, or it promised too little."""
        self._checks.stepped(len(chunks), had_drafts=False)
        made_s = self._proposals.made_s if self._proposed_s else {}
        lost = min(sum(made_s.values()) / max(self._times.seconds(len(chunks)), 1e-9), MOST_STEPS)
        for chunk in chunks:
            if (own := self._open.get(chunk.sequence)) is not None:
                own.credit.generated(1 + self._unmeasured)
                if lost:
                    own.credit.drafted(-lost, is_free=False)
        self._unmeasured = 0
        if self._observing and self._proposed_s:
            chosen_s = self._proposed_s - sum(made_s.values()) - sum(self._proposals.looked_s.values())
            self._costs.spent(self._observing, chosen_s)
            for drafter in self._observing:
                self._costs.spent([drafter], made_s.get(drafter.name, 0.0))

    def _learn_drafted(
        self, chunks: Ids[Chunk], accepted: Ids[int], brought: Ids[int], seconds: float
    ) -> None:
        """What drafts brought, against steps of one token each."""
        tokens, plain = sum(chunk.length for chunk in chunks), sum(chunk.known for chunk in chunks)
        self._checks.stepped(plain, had_drafts=tokens > plain)
        count_s, more = self._times.seconds(len(chunks)), tokens - len(chunks)
        took_s = min(seconds, MOST * self._times.seconds(tokens))
        took_s += min(self._proposed_s, MOST_STEPS * count_s)
        each_s, gained_s = count_s / len(chunks), count_s - took_s
        for chunk, count, added in zip(chunks, accepted, brought, strict=True):
            own = self._open.get(chunk.sequence)
            gained_s += added * each_s
            if own is None:
                continue
            own.credit.generated(1 + added)
            if chunk.length == 1:
                continue
            gained = added + (chunk.length - 1) / more * (count_s - took_s) / each_s
            drafter = own.last = own.drafter or own.last  # or tokens of its last draft are computed again
            own.drafter = None
            is_free = drafter is None or drafter.name in FREE
            own.credit.drafted(gained, is_free=is_free)
            if drafter is not None and chunk.drafted:
                own.acceptance.add(drafter.name, own.draft, count, len(chunk.drafted))
                self.stats.by_drafter[drafter.name].add(len(chunk.drafted), count)
                if own.is_probe:
                    own.credit.probed(paid=gained > 0)
            if drafter is not None and not is_free and self._proposals.made[drafter.name] > SURE:
                self._rests[drafter.name].gained(gained)
        self.stats.gained_s += max(gained_s, 0.0)
        self.stats.lost_s -= min(gained_s, 0.0)

    def _settle(self, chunks: Ids[Chunk], token_s: float) -> None:
        """Charge drafters that are not at rest with what they cost beside the steps that have their drafts,
        where a token takes so long without."""
        due, of_step = self._costs.due([chunk.sequence for chunk in chunks], token_s)
        self.stats.lost_s += of_step
        for drafter in self._observing:
            rest = self._rests[drafter.name]
            rest.gained(-due.get(drafter.name, 0.0) / token_s)
            if rest.is_due:
                self._since_look = max(self._since_look, LOOK_EVERY)
