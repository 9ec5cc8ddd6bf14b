"""Drafts looked up: what followed the last time that the text ended as it does now.

Any model can use them: there are no weights, and a search is a few comparisons of arrays. Answers that repeat
their prompt gain (code that is edited, quotations, tables), others find nothing to look up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.drafts.base import NOTHING, Draft, DraftRequest, Rows

LONGEST = 15
# The text must end in this many tokens of an earlier place: fewer say little of what follows.
SHORTEST_MATCH = 2
# Longer matches are no more telling. They are also how the engine tells kinds of drafts apart.
LONGEST_MATCH = 8
# Places that are compared, the latest ones first; and tokens that are searched, so that a long text takes
# no longer.
MOST_PLACES = 64
MOST_SEARCHED = 1 << 17
ROOM = 512  # tokens by which a text's array grows


class _Text:
    """Token ids in an array that grows with the text.

    copied_to  where in the text the next token was expected, and how long the text was then; it is being
               copied from there, perhaps
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.length = len(token_ids)
        self.copied_to: tuple[int, int] | None = None
        self._ids = np.empty(self.length + ROOM, dtype=np.int32)
        self._ids[: self.length] = token_ids

    @property
    def nbytes(self) -> int:
        return self._ids.nbytes

    def grow(self, token_ids: Sequence[int]) -> np.ndarray:
        """Take what the text has beyond what is known; all of it, `[n]` int32."""
        length = len(token_ids)
        if length > len(self._ids):
            room = np.empty(max(len(self._ids) // 4, length - len(self._ids)) + ROOM, dtype=np.int32)
            self._ids = np.concatenate((self._ids, room))
        self._ids[self.length : length] = token_ids[self.length :]
        self.length = length
        return self._ids[:length]

    def followers(self, token_ids: Sequence[int], most: int) -> Draft:
        """What followed where the text ended as it does now; else what would be copied next."""
        text = self.grow(token_ids)
        place, expected = None, self.copied_to
        if expected is not None:
            place = expected[0] + self.length - expected[1]
        next_place, same = next_in(text, text[-LONGEST_MATCH:], place)
        if not same and place is not None and place < self.length:
            next_place, same = place, int(text[place - 1] == text[-1])
            self.copied_to = None  # once: what is copied then shows in the next ending
        if next_place is None:
            self.copied_to = None
            return NOTHING
        if same:
            self.copied_to = next_place, self.length
        return Draft(tuple(text[next_place : next_place + most].tolist()), kind=same)


def next_in(text: np.ndarray, ending: np.ndarray, preferred: int | None = None) -> tuple[int | None, int]:
    """Where `text` `[n]` goes on behind what `ending` ends in; and how many tokens are the same there, up to
    LONGEST_MATCH. The longest match counts, of equal ones the `preferred`, or else the latest."""
    begin = max(0, len(text) - MOST_SEARCHED)
    text = text[begin:]
    if len(ending) < SHORTEST_MATCH or len(text) <= SHORTEST_MATCH:
        return None, 0
    first = SHORTEST_MATCH - 1
    ends = text[first:-1] == ending[-1]
    for back in range(1, SHORTEST_MATCH):
        ends &= text[first - back : -1 - back] == ending[-1 - back]
    places = (np.flatnonzero(ends)[: -MOST_PLACES - 1 : -1] + first + 1).tolist()
    if preferred is not None and preferred - begin in places:
        places.insert(0, preferred - begin)
    best, length = None, 0
    for place in places:
        same, longest = SHORTEST_MATCH, min(LONGEST_MATCH, place, len(ending))
        while same < longest and text[place - 1 - same] == ending[-1 - same]:
            same += 1
        if same > length:
            best, length = begin + place, same
            if same == LONGEST_MATCH:
                break
    return best, length


class LookupDrafter:
    """A `Drafter` that looks up what followed before, in prompt and answer."""

    name = "lookup"
    longest = LONGEST
    wants_captures = False
    is_whole = True

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}

    @property
    def nbytes(self) -> int:
        return sum(text.nbytes for text in self._texts.values())

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        self._texts[sequence_id] = _Text(token_ids)

    def close(self, sequence_id: int) -> None:
        self._texts.pop(sequence_id, None)

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [
            self._texts[request.sequence_id].followers(request.token_ids, min(request.most, LONGEST))
            for request in requests
        ]

    def observe(self, computed: Sequence[Rows]) -> None:
        """What was accepted stands in the text."""


class PredictionDrafter:
    """A `Drafter` that looks up in what a client expects the answer to be (`prediction`)."""

    name = "prediction"
    longest = LONGEST
    wants_captures = False
    is_whole = True

    def __init__(self) -> None:
        self._expected: dict[int, _Expected] = {}

    @property
    def nbytes(self) -> int:
        return sum(expected.ids.nbytes for expected in self._expected.values())

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        if prediction:
            ids = np.asarray(prediction, dtype=np.int32)[-MOST_SEARCHED:]
            self._expected[sequence_id] = _Expected(ids, len(token_ids))

    def close(self, sequence_id: int) -> None:
        self._expected.pop(sequence_id, None)

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def observe(self, computed: Sequence[Rows]) -> None:
        """What was accepted stands in the text."""

    def _draft(self, request: DraftRequest) -> Draft:
        expected = self._expected.get(request.sequence_id)
        if expected is None:
            return NOTHING
        return expected.followers(request.token_ids, min(request.most, LONGEST))


class _Expected:
    """What a client expects, and how far the answer has come in it.

    begin  tokens before the answer, or what of it there was when this was opened
    """

    def __init__(self, ids: np.ndarray, begin: int) -> None:
        self.ids = ids
        self._begin = begin
        self._place, self._length = 0, begin  # where the next token was expected when the text was so long

    def followers(self, token_ids: Sequence[int], most: int) -> Draft:
        """What is expected next: where the answer was last, if it goes on so, or else where it says the
        same."""
        answer = np.asarray(token_ids[max(self._begin, len(token_ids) - LONGEST_MATCH) :], dtype=np.int32)
        place = self._place + len(token_ids) - self._length
        found, same = next_in(np.append(self.ids, -1), answer, place)
        if found is None:
            found, same = place, int(0 < place <= len(self.ids) and self.ids[place - 1] == token_ids[-1])
        else:
            self._place, self._length = found, len(token_ids)
        drafted = self.ids[found : found + most].tolist()
        return Draft(tuple(drafted), kind=same) if drafted else NOTHING
