"""Tool calls of the history as chat templates read them. Models write arguments that are no JSON objects;
clients send them back, and the conversation must go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any


class ArgumentsForm(Enum):
    """What a template is given as the arguments of a call; most take the first form."""

    AS_WRITTEN = "an object, and what is none as it was written"
    OBJECT = "an object, which what is none stands in as `arguments`"
    TEXT = "JSON as text"


class WrittenArguments(str):
    """Arguments that are no object, as the model wrote them; as JSON they are written the same way again."""


def tool_call(call: Mapping[str, Any], form: ArgumentsForm) -> dict[str, Any]:
    """A call of an OpenAI message with its arguments (there JSON as text) in the given form."""
    function = dict(call.get("function") or {})
    text = function.get("arguments")
    if isinstance(text, str) and form is not ArgumentsForm.TEXT:
        arguments = _object(text)
        if arguments is not None:
            function["arguments"] = arguments
        elif form is ArgumentsForm.OBJECT:
            function["arguments"] = {"arguments": text}
        else:
            function["arguments"] = WrittenArguments(text)
    return {**call, "function": function}


def _object(text: str) -> dict[str, Any] | None:
    """The object that `text` is (an empty one where it says nothing); None where it is none."""
    try:
        value = json.loads(text.strip() or "{}", strict=False)
        json.dumps(value, ensure_ascii=False).encode()  # escapes may spell what is no Unicode
    except (ValueError, RecursionError):
        return None
    if value is None:
        return {}
    return value if isinstance(value, dict) else None
