"""MTP: a draft layer behind the model's last, which is asked again and again for one more token.

Every committed token whose successor is known goes through the layer once, for its keys; the newest one gives
the first draft, and the layer's own state after each draft begins the next. What was drafted is taken back:
its keys are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from engine.drafts.base import NOTHING, Draft, DraftRequest, Rows
from engine.families.base import Batch, KvCache, Segment
from engine.families.decoder.draft_forward import DraftStep
from engine.families.decoder.forward import MAX_ROWS

# One layer was trained to tell one token; asked for more, it gets worse from each to the next.
LONGEST = 3


@dataclass
class _Known:
    """What the layer knows of a sequence.

    first   the token that its keys begin with: none before it was seen
    keyed   tokens from there on that it has keys of
    hidden  of the tokens behind these, `[n, hidden]` in pieces, and the token ids behind each but the last
    """

    slot: int
    first: int = 0
    keyed: int = 0
    hidden: list[torch.Tensor] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Tokens that are not keyed yet."""
        return sum(map(len, self.hidden))

    @property
    def end(self) -> int:
        """The position behind the last token that was seen."""
        return self.first + self.keyed + self.waiting


class AskedLayer(Protocol):
    """A draft layer: what it gives is told by `DraftStep`."""

    def new_cache(self, slots: int, capacity: int) -> KvCache:
        """For so many sequences of so many tokens."""
        ...

    def step(self, batch: Batch, hidden: torch.Tensor, cache: Any) -> DraftStep:
        """A step of a batch whose ids are the tokens behind those of `hidden` `[tokens, width]`."""
        ...


class Mtp:
    """`Drafter` of a model with a draft layer, for up to `slots` sequences of up to `capacity` tokens."""

    name = "mtp"
    longest = LONGEST
    wants_captures = True
    is_whole = False

    def __init__(self, layer: AskedLayer, slots: int, capacity: int) -> None:
        self._layer = layer
        self._cache = layer.new_cache(slots, capacity)
        self._free = list(range(slots))
        self._known: dict[int, _Known] = {}

    @property
    def nbytes(self) -> int:
        """Keys, and buffers of a program."""
        program = self._cache.program
        return sum(self._cache.pages.of_slots()) + (0 if program is None else program.nbytes)

    # -------------------------------------------------------------------------------------- sequences

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        """See `Drafter`."""
        known = self._known[sequence_id] = _Known(self._free.pop())
        self._cache.reset(known.slot)

    def close(self, sequence_id: int) -> None:
        """See `Drafter`."""
        known = self._known.pop(sequence_id, None)
        if known is not None:
            self._cache.release(known.slot)
            self._free.append(known.slot)

    def observe(self, computed: Sequence[Rows]) -> None:
        """Remember what was captured of committed tokens; of long pieces, make keys at once."""
        for rows in computed:
            known, found = self._known[rows.sequence_id], rows.captures
            if found is None or not len(found):
                continue
            ids = list(rows.token_ids[len(rows.token_ids) - len(found) :])
            start = rows.start + len(rows.token_ids) - len(found)
            if start != known.end:  # what was before is not known, or not any more
                self._cache.reset(known.slot)
                known.first, known.keyed, known.hidden, known.token_ids = start, 0, [], []
            elif known.hidden:
                known.token_ids.append(ids[0])
            known.hidden.append(found.clone())
            known.token_ids += ids[1:]
            if known.waiting > MAX_ROWS:
                self._step([(known, known.token_ids)])

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Drafter`; nothing where the tokens just before were not captured."""
        drafts = [NOTHING] * len(requests)
        ready = [
            (at, known)
            for at, request in enumerate(requests)
            if (known := self._known[request.sequence_id]).hidden and known.end == len(request.token_ids) - 1
        ]
        if not ready:
            return drafts
        newest = [requests[at].token_ids[-1] for at, _ in ready]
        lengths = [min(self.longest, requests[at].most) for at, _ in ready]
        pairs = zip(ready, newest, strict=True)
        states, tokens = self._step([(known, [*known.token_ids, token]) for (_, known), token in pairs])
        found = [[token] for token in tokens]
        for depth in range(1, max(lengths)):
            alive = [n for n, length in enumerate(lengths) if length > depth]
            of = [ready[n][1] for n in alive]
            parts = [
                (known.slot, known.keyed + depth - 1, found[n][-1:])
                for n, known in zip(alive, of, strict=True)
            ]
            step = self._layer.step(Batch.of(parts), states[alive], self._cache)
            states = states.clone()
            states[alive] = step.states
            for n, token in zip(alive, step.logits.argmax(1).tolist(), strict=True):
                found[n].append(token)
        for (at, known), ids in zip(ready, found, strict=True):
            self._cache.resume(known.slot, known.keyed, 0)
            drafts[at] = Draft(tuple(ids))
        return drafts

    def _step(self, of: Sequence[tuple[_Known, Sequence[int]]]) -> tuple[torch.Tensor, list[int]]:
        """Key tokens whose successors are these: each sequence's last state, and the likeliest token."""
        ids: list[int] = []
        segments, hidden, wanted = [], [], []
        for known, successors in of:
            count = len(successors)
            waiting = known.hidden[0] if len(known.hidden) == 1 else torch.cat(known.hidden)
            hidden.append(waiting[:count])
            segments.append(Segment(known.slot, known.keyed, count))
            ids += successors
            wanted.append(len(ids) - 1)
            known.keyed += count
            known.hidden, known.token_ids = [waiting[count:]] if count < len(waiting) else [], []
        step = self._layer.step(Batch(ids, tuple(segments), wanted), torch.cat(hidden), self._cache)
        return step.states, step.logits.argmax(1).tolist()
