"""A step in pieces that follow each other through the stages, so that all compute at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from engine.families.base import Batch

# A prompt's pieces are not smaller: each costs a call, and products of few tokens are slow.
LEAST_PIECE = 64


def pieces_of(batch: Batch, stages: int) -> list[Batch]:
    """A batch in pieces that follow each other through the stages, so that all of them compute.

    Answers' tokens are dealt by sequence, as many pieces as there are stages; a long prompt is cut. Rows of
    results keep their order.
    """
    if stages == 1:
        return [batch]
    tokens = len(batch.ids)
    if tokens >= 2 * LEAST_PIECE:
        count = min(2 * stages, tokens // LEAST_PIECE)
    else:
        count = min(stages, len(batch.segments))
    if count <= 1:
        return [batch]
    ends = [0, *(round(tokens * number / count) for number in range(1, count)), tokens]
    if tokens < 2 * LEAST_PIECE:
        ends = _whole_segments(batch, ends)
    return [_piece(batch, first, stop) for first, stop in pairwise(ends) if first < stop]


def _whole_segments(batch: Batch, ends: Sequence[int]) -> list[int]:
    """The ends, moved to those of segments."""
    stops = np.cumsum([0, *(segment.length for segment in batch.segments)])
    return sorted({int(stops[np.abs(stops - end).argmin()]) for end in ends})


def _piece(batch: Batch, first: int, stop: int) -> Batch:
    """Tokens `first` to `stop` of a batch."""
    segments, to_come, at = [], [], 0
    for number, segment in enumerate(batch.segments):
        begin, end = max(first, at), min(stop, at + segment.length)
        if begin < end:
            start = segment.start + begin - at
            segments.append(segment._replace(start=start, length=end - begin))
            later = None if batch.to_come is None else batch.to_come[number]
            to_come.append(None if later is None else later + at + segment.length - end)
        at += segment.length
    wanted = None if batch.wanted is None else [row - first for row in batch.wanted if first <= row < stop]
    return Batch(
        list(batch.ids[first:stop]),
        tuple(segments),
        wanted,
        None if batch.to_come is None else tuple(to_come),
    )
