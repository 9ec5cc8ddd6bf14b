"""Marks in what a request says, so that no special token can come of it in a rendered prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from engine.chat.call_history import WrittenArguments
from engine.tokenizer.prompt import pattern_of


class WithReasoning(str):
    """An assistant's text that begins with its reasoning, between tags that are tags."""

    tags: tuple[str, str]

    @classmethod
    def found_in(cls, text: str, tags: tuple[str, str]) -> str:
        """`text`, as one of these where it begins with reasoning."""
        if not text.lstrip().startswith(tags[0]) or tags[1] not in text:
            return text
        found = cls(text)
        found.tags = tags
        return found

    def around(self) -> tuple[str, str, str]:
        """What stands before the reasoning, in it, and behind it."""
        before, _, rest = self.partition(self.tags[0])
        return (before, *rest.partition(self.tags[1])[::2])


class Marks:
    """Puts marks into what a request says, and takes them out of what the template made of it.

    A control token of one character cannot be broken by a mark inside: it gets two in front.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = list(control_tokens)
        self._single = {token for token in tokens if len(token) == 1}
        pattern = pattern_of(tokens)
        self._token = re.compile(pattern)
        self._token_start = re.compile(f"(?=({pattern}))(.)", re.DOTALL)
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._endings = {token[-n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def put(self, value: Any, mark: str) -> Any:
        """`value` with its strings marked; roles are left alone, they were checked."""
        if isinstance(value, WithReasoning):
            before, reasoning, rest = (self._marked(part, mark) for part in value.around())
            return before + value.tags[0] + reasoning + value.tags[1] + rest
        if isinstance(value, str):
            marked = self._marked(value, mark)
            return WrittenArguments(marked) if isinstance(value, WrittenArguments) else marked
        if isinstance(value, Mapping):
            return {
                self._break(key, mark): item if key == "role" else self.put(item, mark)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.put(item, mark) for item in value]
        return value

    def take_out(self, rendered: str, mark: str) -> tuple[str, list[tuple[int, int]]]:
        """The prompt without marks, and the `[start, end)` ranges of its special tokens."""
        parts: list[str] = []
        ranges: list[tuple[int, int]] = []
        done = size = 0
        for match in self._token.finditer(rendered):
            if match.group() in self._single and rendered.endswith(mark * 2, 0, match.start()):
                continue
            plain = rendered[done : match.start()].replace(mark, "")
            parts += [plain, match.group()]
            size += len(plain)
            ranges.append((size, size + len(match.group())))
            size, done = ranges[-1][1], match.end()
        parts.append(rendered[done:].replace(mark, ""))
        return "".join(parts), ranges

    def _break(self, text: str, mark: str) -> str:
        """A mark after the first character of every special token that is spelled in `text`."""

        def broken(match: re.Match[str]) -> str:
            front = mark * 2 if match.group(2) in self._single else ""
            return front + match.group(2) + (mark if len(match.group(1)) > 1 else "")

        return self._token_start.sub(broken, text)

    def _marked(self, text: str, mark: str) -> str:
        text = self._break(text, mark)
        # The template may trim, so the edges are those of the trimmed text.
        head, tail = text.lstrip(), text.rstrip()
        lengths = range(1, self._longest)
        if any(tail[-n:] in self._beginnings for n in lengths):
            text = tail + mark + text[len(tail) :]
        if any(head[:n] in self._endings for n in lengths):
            text = text[: len(text) - len(text.lstrip())] + mark + text.lstrip()
        return text
