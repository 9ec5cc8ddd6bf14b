"""Drafts by a small model beside the large one: it goes on greedily, and the large one says how far that was
right.

The small model has keys and values of its own. It reads a prompt's chunks as the large one does; what it has
drafted and was not accepted is taken back. Both must have the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.drafts.base import NOTHING, Draft, DraftRequest, Rows
from engine.families.base import Batch, Model

LONGEST = 8
MAX_ROWS = 16  # of a recorded step
# Tokens that it reads at once; and that it reads at most of a sequence before a draft, where it was told
# nothing of a prompt: there is no draft until it has read all.
CHUNK, CATCH_UP = 512, 256
# It drafts on while its own token is at least so likely.
LEAST_CHANCE = 0.3


@dataclass
class _Known:
    """A sequence: its slot, None where all are taken, and the tokens which the slot holds; the first
    `settled` of them are the sequence's own."""

    slot: int | None
    ids: list[int] = field(default_factory=list)
    settled: int = 0


class SmallModel:
    """`Drafter` of a model, for up to `slots` sequences of up to `capacity` tokens, for one with ids below
    `vocab_size`."""

    name = "model"
    longest = LONGEST
    wants_captures = False
    is_whole = False

    def __init__(self, model: Model, slots: int, capacity: int, vocab_size: int) -> None:
        self._model = model
        self._capacity = capacity
        self._vocab_size = vocab_size
        self._cache = model.new_cache(slots, capacity)
        self._free = list(range(slots))
        self._known: dict[int, _Known] = {}

    @property
    def nbytes(self) -> int:
        """Keys and values, and buffers of a program."""
        program = self._cache.program
        return sum(self._cache.pages.of_slots()) + (0 if program is None else program.nbytes)

    # -------------------------------------------------------------------------------------- sequences

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        """See `Drafter`."""
        known = self._known[sequence_id] = _Known(self._free.pop() if self._free else None)
        if known.slot is not None:
            self._cache.reset(known.slot)

    def close(self, sequence_id: int) -> None:
        """See `Drafter`."""
        known = self._known.pop(sequence_id, None)
        if known is not None and known.slot is not None:
            self._cache.release(known.slot)
            self._free.append(known.slot)

    def observe(self, computed: Sequence[Rows]) -> None:
        """Read a prompt's chunks; what comes token by token is read when it is needed."""
        for rows in computed:
            known = self._known[rows.sequence_id]
            is_next = known.slot is not None and rows.start == len(known.ids)
            if (
                is_next
                and len(rows.token_ids) > MAX_ROWS
                and self._has_room(rows.start + len(rows.token_ids))
            ):
                self._read(known, rows.token_ids)

    @torch.inference_mode()
    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Drafter`; nothing for sequences that are too long, or of which much was not read yet."""
        ready = [(at, self._known[r.sequence_id]) for at, r in enumerate(requests)]
        ready = [(at, known) for at, known in ready if self._catches_up(known, requests[at])]
        drafts = [NOTHING] * len(requests)
        parts = [(known, list(requests[at].token_ids[len(known.ids) :])) for at, known in ready]
        found: dict[int, tuple[list[int], list[float]]] = {at: ([], []) for at, _ in ready}
        while ready:
            drawn = self._go_on(parts)
            still = []
            for (at, known), (token, chance) in zip(ready, drawn, strict=True):
                if token >= self._vocab_size:
                    continue
                ids, chances = found[at]
                ids.append(token)
                chances.append(chance)
                if chance >= LEAST_CHANCE and len(ids) < min(LONGEST, requests[at].most):
                    still.append((at, known))
            ready = still
            parts = [(known, found[at][0][-1:]) for at, known in ready]
        for at, (ids, chances) in found.items():
            drafts[at] = Draft(tuple(ids), tuple(chances))
        return drafts

    # ------------------------------------------------------------------------------------- computation

    def _has_room(self, tokens: int) -> bool:
        return tokens + LONGEST <= self._capacity

    def _catches_up(self, known: _Known, request: DraftRequest) -> bool:
        """Take back what is not the sequence's; whether little is left to be read."""
        slot, ids = known.slot, request.token_ids
        if slot is None or not self._has_room(len(ids)):
            return False
        kept, most = known.settled, min(len(known.ids), len(ids) - 1)
        while kept < most and known.ids[kept] == ids[kept]:
            kept += 1
        kept = min(kept, most)
        shortest = self._cache.shortest(slot)
        if kept < len(known.ids):
            if kept < shortest:
                kept = shortest = 0
                self._cache.reset(slot)
            else:
                self._cache.resume(slot, kept, shortest)
            del known.ids[kept:]
        known.settled = kept
        missing = len(ids) - kept
        if missing <= CATCH_UP:
            return True
        self._read(known, ids[kept : kept + CATCH_UP])
        return False

    @torch.inference_mode()
    def _read(self, known: _Known, ids: Sequence[int]) -> None:
        assert known.slot is not None
        for first in range(0, len(ids), CHUNK):
            chunk = list(ids[first : first + CHUNK])
            self._model.forward(Batch.of([(known.slot, len(known.ids), chunk)]), self._cache)
            known.ids += chunk
        known.settled = len(known.ids)

    def _go_on(self, parts: Sequence[tuple[_Known, list[int]]]) -> list[tuple[int, float]]:
        """Read tokens of some sequences: the likeliest behind each, and its chance."""
        of_slots = [(known.slot, len(known.ids), ids) for known, ids in parts if known.slot is not None]
        is_short = sum(len(ids) for _, ids in parts) <= MAX_ROWS  # a recorded step has all logits
        logits = self._model.forward(Batch.of(of_slots, all_logits=is_short), self._cache).numpy()
        found, row = [], -1
        for known, ids in parts:
            known.ids += ids
            row += len(ids) if is_short else 1
            best = int(logits[row].argmax())
            found.append((best, 1.0 / float(np.exp(logits[row] - logits[row, best]).sum())))
        return found
