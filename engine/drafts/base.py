"""What the engine requires of a drafter: guesses of the next tokens of an answer, cheaper than a step each.

A step then computes a sequence's newest token and the drafted ones behind it, and keeps what the model itself
would have said (engine/drafts/verify.py). So drafts change when tokens come, never which. A drafter may guess
as badly as it likes, and may be asked for nothing for a long time.

Sequences are known by their numbers. The engine's thread calls everything here, in this order: `open` when a
sequence gets a slot; in each step `draft`, then, behind the model's forward, `observe`; `close` when the
sequence has ended or lost its slot. One that was put aside is opened again, with the answer so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

MOST_ROWS = 16  # of a step with drafts: those of a recorded one
# Drafters that only look up what is there: their drafts cost nothing, and are kept apart by how much matched.
FREE = ("prediction", "lookup")


class Draft(NamedTuple):
    """Tokens that probably follow, the first one behind the sequence's newest token.

    token_ids  at most as many as were asked for; none where the drafter has no idea
    chances    of each to be accepted if those before it are, 0 to 1, where the drafter has reason to say;
               None: the engine goes by what was accepted of this drafter so far
    kind       drafts of the same kind are accepted alike: the engine counts what was accepted by kind
    """

    token_ids: tuple[int, ...] = ()
    chances: tuple[float, ...] | None = None
    kind: int = 0


NOTHING = Draft()


class DraftRequest(NamedTuple):
    """A sequence that wants a draft.

    token_ids  prompt and answer so far, read only; the newest token is not in the model's cache yet
    most       how many tokens may be drafted, at least 1
    """

    sequence_id: int
    token_ids: Sequence[int]
    most: int


class Rows(NamedTuple):
    """Consecutive tokens of a sequence which the model has computed, and which are kept.

    Of a prompt they are a chunk of it; of an answer the token that a step was for, and the drafts that were
    accepted. Which token follows the last one is known when a draft is wanted next.

    start      position of the first
    token_ids  the tokens themselves
    captures   `[n, width]` float32 of the last n of them: what `Model.capture` says, where the drafter wants
               it (`wants_captures`); fewer than all where the model has left out what its own later tokens do
               not look back on. None where the drafter does not want it
    """

    sequence_id: int
    start: int
    token_ids: Sequence[int]
    captures: torch.Tensor | None = None


class Drafter(Protocol):
    """A source of drafts.

    name     "lookup", "prediction", "mtp", "dspark" or "model", in settings and metrics
    longest  tokens that it drafts at most
    wants_captures  whether `observe` is to be given what the model captures
    is_whole  a draft takes as long, however few tokens of it are asked for
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def longest(self) -> int:
        """See above."""
        ...

    @property
    def wants_captures(self) -> bool:
        """See above."""
        ...

    @property
    def is_whole(self) -> bool:
        """See above."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now, beyond weights that a plan has counted."""
        ...

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        """A sequence begins, or goes on after it was put aside; `prediction` is what its client expects the
        answer to be. The model may hold a beginning of the tokens already, which `observe` is never told of:
        the first `Rows` then start behind it."""
        ...

    def close(self, sequence_id: int) -> None:
        """Forget a sequence."""
        ...

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """A draft for each request, all of sequences that are open. It is greedy: the engine draws with each
        sequence's own random numbers, and accepts while what it draws is what was drafted.

        What was drafted for a sequence before and is not in `token_ids` was not accepted, or not even
        computed: the engine may compute fewer tokens than were drafted.
        """
        ...

    def observe(self, computed: Sequence[Rows]) -> None:
        """Rows that the last forward has computed, of sequences that are open."""
        ...
