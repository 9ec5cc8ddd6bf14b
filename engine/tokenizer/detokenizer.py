"""Tokens to text while they arrive: no half characters, no part of a stop string, ever."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from engine.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Text that is now certain, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class Detokenizer:
    """Streams the text of one sequence.

    Bytes that do not yet complete a character are held back, and so is text that may turn out to
    be the beginning of a stop string. With `include_stop` a matched stop string is part of the text, with
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
        added = tokenizer.backend.get_added_tokens_decoder().items() if skip_special else ()
        self._skipped = {i for i, token in added if token.special}
        self._held = ""

    def push(self, token_id: int, *, may_stop: bool = True) -> Piece:
        """The text that `token_id` makes certain; with `may_stop` False it is no part of a stop string."""
        spelled = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        text = self._decoder.decode(spelled)
        return self._release(text) if may_stop else Piece(text)

    def finish(self) -> Piece:
        """Everything still held back; a character that never completed becomes U+FFFD."""
        piece = self._release(self._decoder.decode(b"", final=True))
        if piece.stop is not None:
            return piece
        rest, self._held = self._held, ""
        return Piece(piece.text + rest)

    def _release(self, text: str) -> Piece:
        if not self._stop:
            return Piece(text)
        self._held += text
        matches = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if matches:
            at, stop = min(matches, key=lambda match: (match[0], -len(match[1])))
            text = self._held[: at + len(stop) if self._include_stop else at]
            self._held = ""
            return Piece(text, stop)
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return Piece(certain)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
