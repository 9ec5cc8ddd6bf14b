"""Which tokens the next step computes: every running decode, then prompt chunks in order of arrival."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next `length` pending tokens of a sequence."""

    sequence: Sequence
    length: int


class Scheduler:
    """Sequences in order: waiting ones get a free slot as it appears, first come first served.

    slots         sequences that run together, one cache slot each
    token_budget  most tokens of one step; decodes come first, prompts fill up what is left
    """

    def __init__(self, slots: int, token_budget: int) -> None:
        self.token_budget = token_budget
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(slots - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """True while a sequence runs or waits: when all that ran end together, others may still wait."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give free slots to waiting sequences; returns those that now run."""
        admitted = []
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            sequence.slot = self._free.pop()
            sequence.queue_s = time.perf_counter() - sequence.submitted_s
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def next_chunks(self) -> list[Chunk]:
        """Chunks of the next step; none when idle."""
        chunks = [Chunk(s, 1) for s in self.running if not s.is_prefilling]
        budget = max(self.token_budget - len(chunks), 1)
        for sequence in self.running:
            if sequence.is_prefilling and budget > 0:
                length = min(sequence.pending, budget)
                if sequence.parting is not None and sequence.parting > sequence.computed:
                    length = min(length, sequence.parting - sequence.computed)
                chunks.append(Chunk(sequence, length))
                budget -= length
        return chunks

    def release(self, sequence: Sequence) -> None:
        """Take a finished sequence out, wherever it is; its slot is free from now on."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._free.append(sequence.slot)
        sequence.slot = None
