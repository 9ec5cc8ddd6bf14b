"""What grammars for tool calls are made from: how a dialect spells calls, and the schemas of the tools."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from engine.grammar.lark import GrammarWriter
from engine.grammar.schema import with_each
from quant.errors import RequestError

# Keywords that say nothing about which texts are valid.
ANNOTATIONS = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
}
DEFINITIONS = ("$defs", "definitions")
WHOLE = "#/$defs/arguments"  # where the schema of all arguments stands beside one of a part of it
LARK = "x-lark"  # beside `type: string`: a grammar of the text
OBJECT_KEYWORDS = {"type", "properties", "required", "additionalProperties"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class CallSpelling(ABC):
    """How a dialect writes calls.

    begin    what the first call begins with, after which nothing is content any more
    alone    calls stand in place of content, never behind it
    """

    begin: str
    alone: bool = False

    @abstractmethod
    def calls(self, writer: GrammarWriter, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        """What follows `begin`: one call of one of `tools` (functions as in OpenAI's requests), or more.

        Raises RequestError for a schema that cannot be written in this dialect.
        """


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether a tool's arguments must follow its schema to the letter."""
    return tool["function"].get("strict") is True


def arguments_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments. One that lists properties lets in no others unless it says so."""
    schema = tool["function"].get("parameters") or NO_ARGUMENTS
    return {"additionalProperties": False, **schema} if "properties" in schema else dict(schema)


def lark_of(schema: Any) -> str | None:
    """The grammar that a string must follow, in a keyword of our own; it is the only argument of its tool."""
    grammar = schema.get(LARK) if isinstance(schema, Mapping) else None
    return grammar if isinstance(grammar, str) and grammar else None


def within(schema: Mapping[str, Any], *place: str) -> Any:
    """The schema at a place in `schema`, to be read by itself: what it refers to comes with it."""
    part: Any = schema
    for step in place:
        part = part[step]
    if not isinstance(part, Mapping) or '"$ref"' not in json.dumps(part):
        return part
    steps = "".join(f"/{quote(step.replace('~', '~0').replace('/', '~1'))}" for step in place)
    return {"$ref": f"{WHOLE}{steps}", "$defs": {WHOLE.rpartition("/")[2]: _moved(schema)}}


def _moved(schema: Any) -> Any:
    """`schema` with references to places in it as they are where it stands at WHOLE."""
    if not isinstance(schema, Mapping):
        return schema
    moved = with_each(schema, _moved)
    if isinstance(target := moved.get("$ref"), str) and re.match(r"#(/|\Z)", target):
        moved["$ref"] = WHOLE + target[1:]
    return moved


def string_part(schema: Any) -> tuple[list[str] | None, bool]:
    """What a schema takes as plain text, and whether it takes anything else.

    The first is None for no string, the empty list for every string, else the strings. Strings that
    are limited in other ways (a pattern, a length) are left to JSON.
    """
    keywords = schema.keys() - ANNOTATIONS if isinstance(schema, Mapping) else set()
    if not keywords:
        return [], True
    listing = keywords - {"type"}
    if listing == {"const"} or (listing == {"enum"} and isinstance(schema["enum"], list)):
        values = schema["enum"] if "enum" in listing else [schema["const"]]
        strings = [value for value in values if isinstance(value, str)]
        return (strings or None), len(strings) < len(values)
    if keywords == {"type"}:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return ([] if "string" in types else None), types != ["string"]
    if keywords == {"anyOf"} and isinstance(schema["anyOf"], list):
        return ([] if any(string_part(each)[0] == [] for each in schema["anyOf"]) else None), True
    return None, True


def properties_of(schema: Mapping[str, Any], field: str, strict: bool) -> tuple[Mapping[str, Any], list[str]]:
    """The properties by name, and the names of those that must be there."""
    other = sorted(schema.keys() - ANNOTATIONS - {*DEFINITIONS, "$schema"} - OBJECT_KEYWORDS)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    is_plain = isinstance(properties, Mapping) and isinstance(required, list) and not (other and strict)
    if schema.get("type") == "object" and is_plain:
        return properties, required
    text = f"{field}: this model's tool calls need a schema of type object with properties at the top level"
    raise RequestError(f"{text}; {other} cannot be enforced" if other else text, param=field)


def checked_name(name: str, field: str) -> str:
    """A name as it may stand outside JSON. Raises RequestError for one that would not end where it does."""
    if re.search(r'["<>&\s｜\\\x00-\x1f]', name):
        text = f"{field}: the name {name!r} has a character that this model's tool calls cannot carry"
        raise RequestError(text, param=field)
    return name


def field_of(index: int) -> str:
    """The field of a request that has a tool's schema."""
    return f"tools[{index}].function.parameters"


def format_field(index: int) -> str:
    """The field of a request that has the grammar of a tool's input."""
    return f"tools[{index}].custom.format"
