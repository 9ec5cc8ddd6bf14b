"""What the scripts of Python clients share: the questions, and a tool that reads the note."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

URL, KEY = os.environ["URL"], os.environ["KEY"]
FIRST, SECOND = os.environ["FIRST"], os.environ["SECOND"]
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"name": "read_file", "description": "Reads a file", "parameters": SCHEMA}


def read(arguments: str) -> str:
    """The file that a call's arguments name."""
    return read_file(json.loads(arguments)["path"])


def result_of(call: Any) -> dict[str, Any]:
    """The message that answers a call of Chat Completions."""
    return {"role": "tool", "tool_call_id": call.id, "content": read(call.function.arguments)}


def read_file(path: str) -> str:
    """The text of a file."""
    return Path(path).read_text()


def second_turn(question: str | None = SECOND) -> None:
    """Say where the second turn begins."""
    if question is not None:
        print("--- second turn")
