"""Tags in generated text. A tag that the vocabulary has as a token is that token, and text that spells it is
text; any other is found by its spelling."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

# `[start, end)` offsets into a text, of what added tokens wrote there.
SpecialRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tag:
    """A tag that was found."""

    spelling: str


Item = str | Tag


class TagFinder:
    """Cuts streamed text into tags and what stands between them; holds back what may become a tag.

    tags        spellings to look for, of which none begins inside another
    tokens      spellings of the vocabulary's added tokens
    """

    def __init__(self, tags: Collection[str], tokens: Collection[str]) -> None:
        self._tokens = frozenset(tag for tag in tags if tag in tokens)
        self._all = _Spellings(tags)
        self._others = _Spellings([tag for tag in tags if tag not in self._tokens])
        self._held = ""

    def push(self, text: str, special_ranges: SpecialRanges | None) -> list[Item]:
        """What is certain after `text`. Where it is not known what tokens wrote (None), spelling decides."""
        spellings = self._all if special_ranges is None else self._others
        items: list[Item] = []
        done = 0
        for start, end in special_ranges or ():
            if text[start:end] in self._tokens:
                items += [*self._cut(text[done:start], spellings), *self.finish(), Tag(text[start:end])]
                done = end
        return [*items, *self._cut(text[done:], spellings)]

    def finish(self) -> list[Item]:
        """What was held back."""
        held, self._held = self._held, ""
        return [held] if held else []

    def _cut(self, text: str, spellings: _Spellings) -> Iterable[Item]:
        text = self._held + text
        done = 0
        for match in spellings.pattern.finditer(text):
            if match.start() > done:
                yield text[done : match.start()]
            yield Tag(match.group())
            done = match.end()
        certain = len(text) - spellings.begun_at_end_of(text[done:])
        self._held = text[certain:]
        if certain > done:
            yield text[done:certain]


class _Spellings:
    """Tags that are found by how they are spelled."""

    def __init__(self, tags: Collection[str]) -> None:
        self.pattern = re.compile("|".join(map(re.escape, tags)) or r"(?!)")
        self._beginnings = {tag[:n] for tag in tags for n in range(1, len(tag))}
        self._longest = max(map(len, self._beginnings), default=0)

    def begun_at_end_of(self, text: str) -> int:
        """Length of the longest end of `text` that a tag may grow from."""
        lengths = range(min(len(text), self._longest), 0, -1)
        return next((n for n in lengths if text[-n:] in self._beginnings), 0)
