"""A tool call in JSON, read while it is written: its name, then its arguments as they come."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

# Name first, and arguments that are an object: how models are taught to write calls. No tag begins in it,
# so it does not matter whether a tag or the head is looked for first.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\\n<]|\\[^<])*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_NOTABLE = re.compile(r'["{}\[\]<\n]|\\.?', re.DOTALL)


@dataclass(frozen=True)
class CallHead:
    """The name of a call, and where in the text its arguments begin."""

    name: str
    stop: int


def read_head(text: str) -> CallHead | None:
    """The head of the call that `text` begins with; None where it is none, or not all of it is there."""
    found = _HEAD.match(text)
    if found is None:
        return None
    try:
        name: str = json.loads(found.group(1))
    except ValueError:
        return None
    return CallHead(name.encode(errors="replace").decode(), found.end())


class ObjectReader:
    """Finds the end of one JSON object in text that comes in pieces.

    Of JSON that is broken it knows what would never end: a tag outside a string, a line break inside one.
    """

    def __init__(self) -> None:
        self.has_ended = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False  # the last piece ended with a backslash

    def take(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        at = 1 if self._is_escaped and text else 0
        self._is_escaped = self._is_escaped and not text
        for found in _NOTABLE.finditer(text, at):
            mark = found.group()
            if mark == "\\":
                self._is_escaped = True
            elif mark == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                self.has_ended = mark == "\n"
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
                self.has_ended = self._depth == 0
            else:
                self.has_ended = mark == "<"
            if self.has_ended:
                return found.end() if mark in "}]" else found.start()
        return len(text)
