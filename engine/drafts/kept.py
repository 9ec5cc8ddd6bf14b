"""Copies of states that cannot be rolled back, for steps that may have computed too much.

Caches go back by as many tokens as they have room for (`KvCache.margin`). DeltaNet's states cannot: there, a
slot's state is copied before a step with drafts. Where a draft was not accepted, the copy is put back, and
the tokens that were accepted are computed again along with the next step.
"""

from __future__ import annotations

import torch

from engine.cache.prefixes import Prefixes
from engine.families.base import KvCache


class KeptStates:
    """Takes slots of a cache back to where they were.

    lender  whose memory copies are in; None: what needs copies gets no drafts
    most    tokens that a step adds to a slot at most
    """

    def __init__(self, cache: KvCache, lender: Prefixes | None, most: int) -> None:
        self._cache, self._lender = cache, lender
        self._needs_copies = cache.margin < most
        self._copies: dict[int, tuple[torch.Tensor, ...]] = {}  # by slot
        self._lengths: dict[int, tuple[int, int]] = {}  # and the shortest length then

    @property
    def computes_again(self) -> bool:
        """Whether a draft that is not accepted has the step's other tokens computed again."""
        return self._needs_copies

    @property
    def can_keep(self) -> bool:
        """Whether there is memory for copies, where these are needed."""
        return self._lender is not None or not self._needs_copies

    def keep(self, slot: int) -> bool:
        """Called before a step with drafts; False where the slot could not be taken back."""
        if not self._needs_copies:
            return True
        length = self._cache.length(slot)
        state = self._cache.recent(slot, length)
        copy = self._copies.get(slot)
        if copy is None or any(a.shape != b.shape for a, b in zip(copy, state, strict=True)):
            self.drop(slot)
            if self._lender is None or not self._lender.lend(sum(part.nbytes for part in state)):
                return False
            copy = self._copies[slot] = tuple(torch.empty_like(part) for part in state)
        for kept, part in zip(copy, state, strict=True):
            kept.copy_(part)
        self._lengths[slot] = length, self._cache.shortest(slot)
        return True

    def roll_back(self, slot: int, length: int) -> int:
        """Take a slot back to `length` tokens, or to fewer that were there before the step; how many are
        left."""
        if not self._needs_copies:
            self._cache.resume(slot, length, self._cache.shortest(slot))
            return length
        length, shortest = self._lengths[slot]
        for kept, part in zip(self._copies[slot], self._cache.recent(slot, length), strict=True):
            part.copy_(kept)
        self._cache.resume(slot, length, shortest)
        return length

    def drop(self, slot: int) -> None:
        """The slot's sequence has ended."""
        copy = self._copies.pop(slot, None)
        if copy is not None and self._lender is not None:
            self._lender.take_back(sum(part.nbytes for part in copy))
