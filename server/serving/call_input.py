"""Arguments of a tool call in a protocol whose calls have an object for input, whatever the model wrote."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json


class ControlCharacters:
    """Escapes raw control characters in the strings of JSON that comes in pieces: clients refuse them."""

    def __init__(self) -> None:
        self._in_string = False
        self._is_escaped = False

    def escaped(self, text: str) -> str:
        """`text`, the next piece, as JSON has it."""
        return "".join(map(self._character, text))

    def _character(self, character: str) -> str:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = self._in_string
        elif character == '"':
            self._in_string = not self._in_string
        elif character < " " and self._in_string:
            return json.dumps(character)[1:-1]
        return character


def call_input(arguments: str) -> dict[str, Any]:
    """The object that `arguments` are, as far as they came; what is none is the text `arguments` of one."""
    if not arguments.strip():
        return {}
    try:
        value = from_json(ControlCharacters().escaped(arguments), allow_partial="trailing-strings")
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def written_input(value: Any) -> str:
    """The arguments, JSON as text, of an input in the history; a text is as the model wrote it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
