"""Chooses the tokens of the next step: every running decode, then prompts as far as latency allows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from engine.sequence import Sequence

# A prefill makes at least this much progress per step, or it would never finish.
MIN_PREFILL = 16
# Prompt tokens in a step with answers, unless such steps have shown that more are no trouble: what a long
# chunk takes for a token says little of what a short one takes.
BESIDE_ANSWERS = 512
# Weight of the newest step in the running means of step times. Tokens cost more as a prompt grows; a mean
# that lagged would let steps grow with it.
NEWEST = 0.3
RISING = 0.6


HasPages = Callable[[Sequence, int], bool]


class Chunk(NamedTuple):
    """The next `length` tokens of a sequence: pending ones, and behind all of these drafted ones.

    is_predicted  they were drafted from what the client expects
    """

    sequence: Sequence
    length: int
    drafted: tuple[int, ...] = ()
    is_predicted: bool = False

    @property
    def known(self) -> int:
        """Tokens that are not drafted."""
        return self.length - len(self.drafted)

    def without_drafts(self) -> Chunk:
        """Those alone."""
        return Chunk(self.sequence, self.known)

    @property
    def is_of_prompt(self) -> bool:
        """Whether its tokens are a prompt's; no chunk has both those and an answer's."""
        return self.sequence.computed < self.sequence.prompt_length


class Scheduler:
    """First come, first served: waiting sequences get slots as they become free.

    slots         maximum running sequences, one cache slot each
    token_budget  maximum tokens per step; decodes come first, prompts fill the rest
    step_s        target duration of a step with prompts while answers run (or twice that of a step without
                  prompts, if longer); infinite if answers may wait
    shares_prompts  a prompt that is being computed is not started twice: a sequence with the same prompt
                  waits until it is cached
    """

    def __init__(self, slots: int, token_budget: int, step_s: float, *, shares_prompts: bool = False) -> None:
        self.token_budget = token_budget
        self.step_s = step_s
        self.shares_prompts = shares_prompts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(slots - 1, -1, -1))
        self._decode_s: float | None = None  # duration of a step without prompts
        self._prefill_token_s: float | None = None  # time that a prompt token adds to a step
        self._beside_answers = 0  # prompt tokens of the last step that had answers too

    @property
    def has_work(self) -> bool:
        """True while any sequence runs or waits."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def admit(self, has_pages: HasPages | None = None) -> list[Sequence]:
        """Give free slots to waiting sequences; returns the newly admitted ones.

        has_pages  takes what a sequence needs to begin in a slot; where that is not there, it waits, and all
                   behind it
        """
        if not self.waiting:
            return []
        admitted: list[Sequence] = []
        held_back: list[Sequence] = []
        computed_now = {s.prompt_hash for s in self.running if s.is_prefilling}
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            may_share = self.shares_prompts and sequence.params.prompt_logprobs is None
            if may_share and sequence.prompt_hash in computed_now and not sequence.was_aside:
                held_back.append(sequence)
                continue
            if has_pages is not None and not has_pages(sequence, self._free[-1]):
                held_back.append(sequence)
                break
            computed_now.add(sequence.prompt_hash)
            sequence.slot = self._free.pop()
            if sequence.queue_s is None:
                sequence.queue_s = time.perf_counter() - sequence.submitted_s
            self.running.append(sequence)
            admitted.append(sequence)
        self.waiting.extendleft(reversed(held_back))
        return admitted

    def next_chunks(self) -> list[Chunk]:
        """Chunks of the next step; none when idle.

        The oldest prompt gets at least half of the prefill budget, so that none starves; the rest goes to the
        shortest ones first, so that none waits for a long one to finish.
        """
        prompts = [s for s in self.running if s.is_prefilling]
        decodes = [Chunk(s, s.pending) for s in self.running if not s.is_prefilling]
        if not prompts:
            return decodes
        budget = self._prefill_budget(len(decodes))
        lengths = {prompts[0]: min(_wanted(prompts[0]), (budget + 1) // 2)}
        left = budget - lengths[prompts[0]]
        for sequence in [*sorted(prompts[1:], key=_wanted), prompts[0]]:
            more = min(_wanted(sequence) - lengths.get(sequence, 0), left)
            lengths[sequence] = lengths.get(sequence, 0) + more
            left -= more
        return decodes + [Chunk(s, lengths[s]) for s in prompts if lengths[s]]

    def observe(self, chunks: Seq[Chunk], seconds: float) -> None:
        """Update the running means with a step's duration."""
        decodes = sum(not chunk.sequence.is_prefilling for chunk in chunks)
        tokens = sum(chunk.length for chunk in chunks if chunk.sequence.is_prefilling)
        if not tokens:
            self._decode_s = _mean(self._decode_s, seconds)
        elif tokens >= MIN_PREFILL:
            if decodes:
                self._beside_answers = tokens
            alone = (self._decode_s or 0.0) if decodes else 0.0
            token_s = max(seconds - alone, 0.0) / tokens
            weight = RISING if token_s > (self._prefill_token_s or 0.0) else NEWEST
            self._prefill_token_s = _mean(self._prefill_token_s, token_s, weight)

    def release(self, sequence: Sequence) -> None:
        """Remove a finished sequence from the queue or the running set and free its slot."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._free.append(sequence.slot)
        sequence.slot = None

    def put_aside(self, sequence: Sequence) -> None:
        """Take a running sequence's slot; it is the next to get one."""
        self.release(sequence)
        self.waiting.appendleft(sequence)

    def _prefill_budget(self, decodes: int) -> int:
        """Prompt tokens that the next step may compute alongside this many decodes."""
        budget = max(self.token_budget - decodes, 1)
        if not decodes:
            return budget
        budget = min(budget, max(BESIDE_ANSWERS, 2 * self._beside_answers))
        if not self._prefill_token_s or self._decode_s is None:
            return budget
        seconds = max(self.step_s - self._decode_s, self._decode_s)
        return int(min(budget, max(seconds / self._prefill_token_s, MIN_PREFILL)))


def _wanted(sequence: Sequence) -> int:
    """Prompt tokens still to be computed, up to the next stop of the prefill."""
    return sequence.next_stop - sequence.computed


def _mean(mean: float | None, newest: float, weight: float = NEWEST) -> float:
    return newest if mean is None else (1 - weight) * mean + weight * newest
