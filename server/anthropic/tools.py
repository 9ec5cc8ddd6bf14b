"""Tools of a Messages request: functions, the vendor's that clients run, and those that its servers run.

The vendor's models know the second kind by its type alone, such as `bash_20250124`; others are told what it
takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from server.openai.messages import Body, FunctionDefinition, Tool
from server.openai.refused import TOOL_REFUSED, refuse_fields
from server.openai.tools import MAX_NAME


class MessagesTool(Body):
    """A function that the model may call; `input_schema` is a JSON schema."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=MAX_NAME)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_callers(cls, data: Any) -> Any:
        return refuse_fields(data, TOOL_REFUSED, "tools.")


class VendorsTool(Body):
    """A tool whose type says what it is."""

    type: str
    name: str | None = Field(None, min_length=1, max_length=MAX_NAME)


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    is_function = isinstance(value, dict) and "input_schema" in value
    return "<vendor>" if isinstance(kind, str) and kind != "custom" and not is_function else "<function>"


AnyMessagesTool = Annotated[
    Annotated[MessagesTool, Tag("<function>")] | Annotated[VendorsTool, Tag("<vendor>")],
    Discriminator(_kind),
]

_TEXT = {"type": "string"}
_LINE = {"type": "integer"}
_EDITS = {
    "path": _TEXT,
    "file_text": _TEXT,
    "old_str": _TEXT,
    "new_str": _TEXT,
    "insert_line": _LINE,
    "insert_text": _TEXT,
    "view_range": {"type": "array", "items": _LINE},
}
_RENAMED = {"old_path": _TEXT, "new_path": _TEXT}


def _commands(*names: str, **more: Any) -> dict[str, Any]:
    properties = {"command": {"enum": list(names)}, **_EDITS, **more}
    return {"type": "object", "properties": properties, "required": ["command"]}


# By the beginning of the type: what the vendor documents of its tools that clients run.
_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "bash_": (
        "Runs a command in a shell that stays open; `restart` starts a new one.",
        {"type": "object", "properties": {"command": _TEXT, "restart": {"type": "boolean"}}},
    ),
    "text_editor_": (
        "Views, creates and edits files: `view` takes view_range, `create` file_text, `str_replace` old_str "
        "and new_str, `insert` insert_line and insert_text.",
        _commands("view", "create", "str_replace", "insert"),
    ),
    "memory_": (
        "Views, creates, edits, deletes and renames files under /memories.",
        _commands("view", "create", "str_replace", "insert", "delete", "rename", **_RENAMED),
    ),
}


def functions_of(tools: Sequence[MessagesTool | VendorsTool] | None) -> list[Tool]:
    """The functions that the model is shown."""
    found = (_function(tool) for tool in tools or ())
    return [Tool(type="function", function=function) for function in found if function is not None]


def others_in(tools: Sequence[MessagesTool | VendorsTool] | None) -> list[str]:
    """Types of the tools that the model is not shown."""
    return [tool.type for tool in tools or () if isinstance(tool, VendorsTool) and _function(tool) is None]


def _function(tool: MessagesTool | VendorsTool) -> FunctionDefinition | None:
    if isinstance(tool, MessagesTool):
        return FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
    known = next((known for begin, known in _KNOWN.items() if tool.type.startswith(begin)), None)
    if known is None or not tool.name:
        return None
    description, schema = known
    return FunctionDefinition(name=tool.name, description=description, parameters=schema)
