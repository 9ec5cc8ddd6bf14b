"""The different tokens of a text, and how often each is there; a few out of a large vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROOM = 64  # for different tokens that are added, at first


class TokenCounts:
    """Counts tokens; adding one takes no time worth mentioning, whatever the vocabulary."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        ids, counts = np.unique(np.asarray(tokens, dtype=np.int64), return_counts=True)
        self._places = {token: place for place, token in enumerate(ids.tolist())}
        self._ids = np.concatenate((ids, np.zeros(ROOM, dtype=np.int64)))
        self._counts = np.concatenate((counts, np.zeros(ROOM))).astype(np.float32)

    def add(self, token: int) -> None:
        """Count a token once more."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """The tokens, `[n]` int64, each once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `ids` was counted, `[n]` float32."""
        return self._counts[: len(self._places)]
