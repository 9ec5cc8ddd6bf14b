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
    """Token ids in an array that grows with the text."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.length = len(token_ids)
        self._ids = np.empty(self.length + ROOM, dtype=np.int32)
        self._ids[: self.length] = token_ids

    @property
    def nbytes(self) -> int:
        return self._ids.nbytes

    def grow(self, token_ids: Sequence[int]) -> np.ndarray:
        """Take what the text has beyond what is known; all of it, `[n]` int32."""
        length = len(token_ids)
        if length > len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty(len(self._ids) // 4 + ROOM, dtype=np.int32)))
        self._ids[self.length : length] = token_ids[self.length :]
        self.length = length
        return self._ids[:length]


def followers(text: np.ndarray, ending: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """What follows in `text` `[n]` where it says what `ending` ends in, at most `most` tokens; and how many
    tokens are the same there, up to LONGEST_MATCH. The longest match counts, of equal ones the latest."""
    text = text[-MOST_SEARCHED:]
    first = SHORTEST_MATCH - 1
    if len(ending) < SHORTEST_MATCH or len(text) <= SHORTEST_MATCH:
        return text[:0], 0
    ends = text[first:-1] == ending[-1]
    for back in range(1, SHORTEST_MATCH):
        ends &= text[first - back : -1 - back] == ending[-1 - back]
    places = np.flatnonzero(ends)[: -MOST_PLACES - 1 : -1] + first  # of the last token that is the same
    best, length = -1, 0
    for place in places.tolist():
        longest = min(LONGEST_MATCH, place + 1, len(ending))
        same = SHORTEST_MATCH
        while same < longest and text[place - same] == ending[-1 - same]:
            same += 1
        if same > length:
            best, length = place, same
            if same == LONGEST_MATCH:
                break
    if best < 0:
        return text[:0], 0
    return text[best + 1 : best + 1 + most], length


class LookupDrafter:
    """A `Drafter` that looks up what followed before, in prompt and answer."""

    name = "lookup"
    longest = LONGEST
    wants_captures = False

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
        return [self._look_up(request) for request in requests]

    def observe(self, computed: Sequence[Rows]) -> None:
        """What was accepted stands in the text."""

    def _look_up(self, request: DraftRequest) -> Draft:
        text = self._texts[request.sequence_id].grow(request.token_ids)
        found, length = followers(text, text[-LONGEST_MATCH:], min(request.most, LONGEST))
        return Draft(tuple(found.tolist()), kind=length) if length else NOTHING


class PredictionDrafter:
    """A `Drafter` that looks up in what a client expects the answer to be (`prediction`)."""

    name = "prediction"
    longest = LONGEST
    wants_captures = False

    def __init__(self) -> None:
        self._expected: dict[int, tuple[int, np.ndarray]] = {}  # where the answer begins, and the prediction

    @property
    def nbytes(self) -> int:
        return sum(expected.nbytes for _, expected in self._expected.values())

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        if prediction:
            self._expected[sequence_id] = len(token_ids), np.asarray(prediction, dtype=np.int32)

    def close(self, sequence_id: int) -> None:
        self._expected.pop(sequence_id, None)

    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        return [self._look_up(request) for request in requests]

    def observe(self, computed: Sequence[Rows]) -> None:
        """What was accepted stands in the text."""

    def _look_up(self, request: DraftRequest) -> Draft:
        if request.sequence_id not in self._expected:
            return NOTHING
        begin, expected = self._expected[request.sequence_id]
        answer = np.asarray(request.token_ids[begin:][-LONGEST_MATCH:], dtype=np.int32)
        most = min(request.most, LONGEST)
        if len(answer) < SHORTEST_MATCH:  # an answer that has hardly begun begins as the prediction does
            begins = expected[: len(answer)].tolist() == answer.tolist()
            found = expected[len(answer) : len(answer) + most] if begins else expected[:0]
            return Draft(tuple(found.tolist()), kind=0) if len(found) else NOTHING
        found, length = followers(expected, answer, most)
        return Draft(tuple(found.tolist()), kind=length) if length else NOTHING
