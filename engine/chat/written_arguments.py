"""Arguments whose parameters are written one by one as plain text, told as the JSON that they mean.

The schema of the tool says what a text stands for: `5` is a number where numbers are wanted and a string
where strings are. Strings are told while they are written; all else when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from engine.grammar.schema import type_of, types_of

# As models that write much Python spell them.
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class ArgumentsWriter:
    """Writes one JSON object. What its methods return, in order, is its text.

    schema      of the arguments; None where it is not known
    padded      values stand between line breaks that are no part of them
    """

    def __init__(self, schema: Any, *, padded: bool) -> None:
        self._schema = schema if isinstance(schema, Mapping) else {}
        self._padded = padded
        self._members = 0
        self._is_text = False
        self._value_schema: Any = None
        self._is_new = False
        self._held = ""

    def begin(self, key: str, is_text: bool | None = None) -> str:
        """Begin a parameter; `is_text` where its spelling says whether it is a string."""
        self._members += 1
        self._value_schema = self._schema_of(key) if is_text is None else {}
        self._is_text = types_of(self._value_schema) == {"string"} if is_text is None else is_text
        self._is_new, self._held = True, ""
        opening = "{" if self._members == 1 else ", "
        return f"{opening}{_string(key)}: " + ('"' if self._is_text else "")

    def add(self, text: str) -> str:
        """Add `text` to the parameter's value."""
        if not text:
            return ""
        if self._padded and self._is_new:
            text = text.removeprefix("\n")
        self._is_new = False
        self._held += text
        if not self._is_text:
            return ""
        keep = 1 if self._padded and self._held.endswith("\n") else 0
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return _string(told)[1:-1]

    def end(self) -> str:
        """End the parameter."""
        held = self._held.removesuffix("\n") if self._padded else self._held
        return _string(held)[1:] if self._is_text else meant(held, self._value_schema)

    def close(self) -> str:
        """End the object."""
        return "}" if self._members else "{}"

    def _schema_of(self, key: str) -> Any:
        properties = self._schema.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            return properties[key]
        return self._schema.get("additionalProperties")


def meant(text: str, schema: Any) -> str:
    """The JSON that `text` stands for: itself where it is JSON that `schema` takes, else a string."""
    types = types_of(schema)
    bare = text.strip()
    bare = _PYTHON.get(bare, bare)
    try:
        value = json.loads(bare, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # escapes may spell what is no Unicode
    except (ValueError, RecursionError):
        return _string(text)
    type_ = type_of(value)
    fits = types is None or type_ in types or (type_ == "integer" and "number" in types)
    return bare if fits or types is None or "string" not in types else _string(text)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
