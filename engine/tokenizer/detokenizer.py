"""Incremental detokenization: never emits partial characters or parts of a stop string."""

from __future__ import annotations

import codecs
from typing import NamedTuple

from engine.tokenizer.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Text that is final, and the stop string that ended it, if any.

    special_ranges  `[start, end)` offsets of the added tokens in it, whole ones only
    """

    text: str
    stop: str | None = None
    special_ranges: tuple[tuple[int, int], ...] = ()

    def joined(self, then: Piece) -> Piece:
        """This piece and the next one."""
        shifted = ((len(self.text) + start, len(self.text) + end) for start, end in then.special_ranges)
        return Piece(self.text + then.text, then.stop, (*self.special_ranges, *shifted))


class Detokenizer:
    """Streams the text of one sequence.

    Bytes of an incomplete character are held back, and so is text that may be the beginning of a stop string.
    With `include_stop` a matched stop string is part of the text, with
    `skip_special` special tokens are not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        skip_special: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._include_stop = include_stop
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._held = ""
        self._added_ids = frozenset(tokenizer.added_tokens.values())
        self._special: list[tuple[int, int]] = []  # ranges in the held text

    def push(self, token_id: int, *, may_stop: bool = True) -> Piece:
        """The text that `token_id` makes final; with `may_stop` False, it is not matched against stop
        strings."""
        written = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        self._held += self._decoder.decode(written)
        if written and token_id in self._added_ids:
            end = len(self._held)
            self._special.append((end - len(written.decode()), end))
        return self._release() if may_stop else self._piece(len(self._held))

    def finish(self) -> Piece:
        """All text still held back; an incomplete character becomes U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        stopped = self._stopped()
        return self._piece(len(self._held)) if stopped is None else stopped

    def _release(self) -> Piece:
        if not self._stop:
            return self._piece(len(self._held))
        stopped = self._stopped()
        if stopped is not None:
            return stopped
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        return self._piece(len(self._held) - keep)

    def _stopped(self) -> Piece | None:
        """The last piece, if the held text contains a stop string."""
        matches = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if not matches:
            return None
        at, stop = min(matches, key=lambda match: (match[0], -len(match[1])))
        text = self._held[: at + len(stop) if self._include_stop else at]
        special = tuple((start, end) for start, end in self._special if end <= len(text))
        self._held, self._special = "", []
        return Piece(text, stop, special)

    def _piece(self, length: int) -> Piece:
        """So many held characters, fewer where they would end inside a token that stands outside text."""
        if not self._special:
            text, self._held = self._held[:length], self._held[length:]
            return Piece(text)
        length = min([length, *(start for start, end in self._special if end > length)])
        text, self._held = self._held[:length], self._held[length:]
        special = tuple(spot for spot in self._special if spot[1] <= length)
        self._special = [(start - length, end - length) for start, end in self._special if end > length]
        return Piece(text, special_ranges=special)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
