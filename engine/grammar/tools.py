"""Grammars for tool calls, in the spellings that the output parsers read."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from engine.chat.call_block import END_TOOL_CALL, TOOL_CALL
from engine.grammar.lark import GrammarWriter, escaped
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
DSML = "｜DSML｜"
AS_TEXT, AS_JSON = '" string="true">', '" string="false">'
OBJECT_KEYWORDS = {"type", "properties", "required", "additionalProperties"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class CallSpelling(ABC):
    """How a dialect writes calls.

    begin    what the first call begins with, after which nothing is content any more
    """

    begin: str

    @abstractmethod
    def calls(self, writer: GrammarWriter, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        """What follows `begin`: one call of one of `tools` (functions as in OpenAI's requests), or more.

        Raises RequestError for a schema that cannot be written in this dialect.
        """


class TaggedCalls(CallSpelling):
    """`<tool_call>` with a JSON object of name and arguments, as `TaggedParser` reads it."""

    begin = TOOL_CALL

    def calls(self, writer: GrammarWriter, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        bodies = []
        for i, tool in enumerate(tools):
            head = '{"name": ' + json.dumps(tool["function"]["name"], ensure_ascii=False) + ', "arguments": '
            arguments = writer.json(arguments_schema(tool), _field(i), lenient=not is_strict(tool))
            bodies.append(f"{writer.plain(head)} {arguments} {writer.plain('}')}")
        line = writer.plain("\n")
        call = writer.rule(f"{line} ({' | '.join(bodies)}) {line} {writer.literal(END_TOOL_CALL)}")
        return f"{call} ({line} {writer.literal(TOOL_CALL)} {call})*" if several else call


class DsmlCalls(CallSpelling):
    """DeepSeek's blocks of `invoke` elements, in which strings stand as they are and all else as JSON.

    gap      what stands between the token `｜DSML｜` and an element's name
    block    the name of the element around all calls
    """

    def __init__(self, gap: str, block: str) -> None:
        self._gap = gap
        self._block = block
        self.begin = self._tag(block) + "\n"

    def calls(self, writer: GrammarWriter, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        call = writer.rule(" | ".join(self._invocation(writer, i, tool) for i, tool in enumerate(tools)))
        return f"{call}{'+' if several else ''} {writer.literal(self._end_tag(self._block))}"

    def _invocation(self, writer: GrammarWriter, index: int, tool: Mapping[str, Any]) -> str:
        """A call of one tool: its parameters in the schema's order, then others where it lets them in."""
        field, schema, strict = _field(index), arguments_schema(tool), is_strict(tool)
        properties, required = _properties(schema, field, strict)

        def parameter(name: str, *place: str) -> str:
            return writer.rule(self._parameter(writer, name, within(schema, *place), field, strict))

        parts = [writer.literal(self._tag("invoke", _attribute(tool["function"]["name"], field)) + "\n")]
        for name in properties:
            element = parameter(writer.plain(_attribute(name, field)), "properties", name)
            parts.append(element if name in required else f"{element}?")
        if schema.setdefault("additionalProperties", True) is not False:
            known = "".join(f" & ~/{escaped(name)}/" for name in properties)
            other = writer.terminal(f"/[A-Za-z0-9_.-]{{1,64}}/{known}")
            parts.append(parameter(other, "additionalProperties") + "*")
        return writer.rule(" ".join([*parts, writer.literal(self._end_tag("invoke") + "\n")]))

    def _parameter(self, writer: GrammarWriter, name: str, schema: Any, field: str, strict: bool) -> str:
        """A parameter: as plain text where the schema takes strings, as JSON where it takes more."""
        end_tag = self._end_tag("parameter") + "\n"
        end = writer.literal(end_tag)
        kinds = []
        strings, takes_more = string_part(schema)
        if strings is not None:
            listed = " | ".join(f"{writer.plain(each)} {end}" for each in strings)
            kinds.append(f"{writer.plain(AS_TEXT)} ({listed or writer.text_before(end_tag)})")
        if takes_more:
            value = schema if isinstance(schema, Mapping) else {}
            kinds.append(f"{writer.plain(AS_JSON)} {writer.json(value, field, lenient=not strict)} {end}")
        begin = writer.literal(f'<{DSML}{self._gap}parameter name="')
        return f"{begin} {name} ({' | '.join(kinds)})"

    def _tag(self, element: str, name: str | None = None) -> str:
        return f"<{DSML}{self._gap}{element}" + ("" if name is None else f' name="{name}"') + ">"

    def _end_tag(self, element: str) -> str:
        return f"</{DSML}{self._gap}{element}>"


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether a tool's arguments must follow its schema to the letter."""
    return tool["function"].get("strict") is True


def arguments_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments. One that lists properties lets in no others unless it says so."""
    schema = tool["function"].get("parameters") or NO_ARGUMENTS
    return {"additionalProperties": False, **schema} if "properties" in schema else dict(schema)


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


def _properties(schema: Mapping[str, Any], field: str, strict: bool) -> tuple[Mapping[str, Any], list[str]]:
    """The properties by name, and the names of those that must be there."""
    other = sorted(schema.keys() - ANNOTATIONS - {*DEFINITIONS, "$schema"} - OBJECT_KEYWORDS)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    is_plain = isinstance(properties, Mapping) and isinstance(required, list) and not (other and strict)
    if schema.get("type") == "object" and is_plain:
        return properties, required
    text = f"{field}: this model's tool calls need a schema of type object with properties at the top level"
    raise RequestError(f"{text}; {other} cannot be enforced" if other else text, param=field)


def _attribute(name: str, field: str) -> str:
    if re.search(r'["<>&\s｜\\\x00-\x1f]', name):
        text = f"{field}: the name {name!r} has a character that this model's tool calls cannot carry"
        raise RequestError(text, param=field)
    return name


def _field(index: int) -> str:
    return f"tools[{index}].function.parameters"
