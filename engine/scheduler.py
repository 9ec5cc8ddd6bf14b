"""Which tokens the next step computes: every running decode, then as much of prompts as they can bear."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.sequence import Sequence

# A prompt goes on by at least so many tokens a step, or it would never end.
MIN_PREFILL = 16
# Weight of the newest step in the running means of what steps take. Tokens cost the more the longer a prompt
# grows; a mean that followed too slowly would let steps grow with it.
NEWEST = 0.3
RISING = 0.6


@dataclass(frozen=True)
class Chunk:
    """The next `length` pending tokens of a sequence."""

    sequence: Sequence
    length: int


class Scheduler:
    """Sequences in order: waiting ones get a free slot as it appears, first come first served.

    slots         sequences that run together, one cache slot each
    token_budget  most tokens of one step; decodes come first, prompts fill up what is left
    step_s        seconds that a step may take for the sake of prompts while answers run (or twice what
                  it takes without them, if that is longer); infinite where they may wait
    shares_prompts  a prompt that is being computed is not begun a second time: whoever has the same one
                  waits until it is known
    """

    def __init__(self, slots: int, token_budget: int, step_s: float, *, shares_prompts: bool = False) -> None:
        self.token_budget = token_budget
        self.step_s = step_s
        self.shares_prompts = shares_prompts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(slots - 1, -1, -1))
        self._decode_s: float | None = None  # of a step without prompts
        self._prefill_token_s: float | None = None  # what a token of a prompt adds to a step

    @property
    def has_work(self) -> bool:
        """True while a sequence runs or waits: when all that ran end together, others may still wait."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give free slots to waiting sequences; returns those that now run."""
        admitted: list[Sequence] = []
        held_back: list[Sequence] = []
        computed_now = {s.prompt_hash for s in self.running if s.is_prefilling}
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            may_share = self.shares_prompts and sequence.params.prompt_logprobs is None
            if may_share and sequence.prompt_hash in computed_now:
                held_back.append(sequence)
                continue
            computed_now.add(sequence.prompt_hash)
            sequence.slot = self._free.pop()
            sequence.queue_s = time.perf_counter() - sequence.submitted_s
            self.running.append(sequence)
            admitted.append(sequence)
        self.waiting.extendleft(reversed(held_back))
        return admitted

    def next_chunks(self) -> list[Chunk]:
        """Chunks of the next step; none when idle.

        The oldest prompt gets at least half of what there is for prompts, so that none waits for ever;
        the rest goes to the shortest ones, so that none waits for a long one to end.
        """
        decodes = [Chunk(s, 1) for s in self.running if not s.is_prefilling]
        prompts = [s for s in self.running if s.is_prefilling]
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
        """Learn from what a step took."""
        decodes = sum(not chunk.sequence.is_prefilling for chunk in chunks)
        tokens = sum(chunk.length for chunk in chunks) - decodes
        if not tokens:
            self._decode_s = _mean(self._decode_s, seconds)
        elif tokens >= MIN_PREFILL:
            alone = (self._decode_s or 0.0) if decodes else 0.0
            token_s = max(seconds - alone, 0.0) / tokens
            weight = RISING if token_s > (self._prefill_token_s or 0.0) else NEWEST
            self._prefill_token_s = _mean(self._prefill_token_s, token_s, weight)

    def release(self, sequence: Sequence) -> None:
        """Take a finished sequence out, wherever it is; its slot is free from now on."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._free.append(sequence.slot)
        sequence.slot = None

    def _prefill_budget(self, decodes: int) -> int:
        """Tokens of prompts that the next step may compute beside so many decodes."""
        budget = max(self.token_budget - decodes, 1)
        if not decodes or not self._prefill_token_s or self._decode_s is None:
            return budget
        seconds = max(self.step_s - self._decode_s, self._decode_s)
        return int(min(budget, max(seconds / self._prefill_token_s, MIN_PREFILL)))


def _wanted(sequence: Sequence) -> int:
    """Tokens that a prompt could go on by."""
    if sequence.parting is not None and sequence.parting > sequence.computed:
        return sequence.parting - sequence.computed
    return sequence.pending


def _mean(mean: float | None, newest: float, weight: float = NEWEST) -> float:
    return newest if mean is None else (1 - weight) * mean + weight * newest
