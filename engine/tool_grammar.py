"""Grammars for tool calls, in the spellings that the output parsers read."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from engine.grammar import GrammarWriter
from engine.output_parser import END_TOOL_CALL, TOOL_CALL
from quant.errors import RequestError

# Keywords that say nothing about which texts are valid.
ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
DEFINITIONS = ("$defs", "definitions")
DSML = "｜DSML｜"
AS_TEXT, AS_JSON = '" string="true">', '" string="false">'
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
        invocations = [
            self._invocation(writer, tool, _field(i), is_strict(tool)) for i, tool in enumerate(tools)
        ]
        call = writer.rule(" | ".join(invocations))
        return f"{call}{'+' if several else ''} {writer.literal(self._end_tag(self._block))}"

    def _invocation(self, writer: GrammarWriter, tool: Mapping[str, Any], field: str, strict: bool) -> str:
        name, schema = tool["function"]["name"], arguments_schema(tool)
        begin = writer.literal(self._tag("invoke", name=_attribute(name, field)) + "\n")
        end = writer.literal(self._end_tag("invoke") + "\n")
        parameters = self._parameters(writer, schema, field, strict)
        return writer.rule(" ".join([begin, *parameters, end]))

    def _parameters(
        self, writer: GrammarWriter, schema: Mapping[str, Any], field: str, strict: bool
    ) -> list[str]:
        """One expression per property in the schema's order, then one for others where it lets them in."""
        unknown = schema.keys() - {"type", "properties", "required", "additionalProperties"}
        unknown -= ANNOTATIONS | {*DEFINITIONS, "$schema"}
        if schema.get("type") != "object" or (unknown and strict):
            found = f"its keywords {sorted(unknown)}" if unknown else f"type {schema.get('type')!r}"
            raise RequestError(
                f"{field}: this model's tool calls need an object with properties at the top, not {found}",
                param=field,
            )
        properties, required = schema.get("properties", {}), schema.get("required", ())
        shared = {name: schema[name] for name in DEFINITIONS if name in schema}
        result = []
        for name, value in properties.items():
            spelled = _attribute(name, field)
            element = writer.rule(self._element(writer, writer.plain(spelled), value, shared, field, strict))
            result.append(element if name in required else f"{element}?")
        others = schema.get("additionalProperties", False)
        if others is not False:
            known = "".join(f" & ~/{re.escape(name)}/" for name in properties)
            value = others if isinstance(others, Mapping) else {}
            name_ = writer.terminal(f'/[^"<>&\\n{DSML[0]}]+/{known}')
            result.append(writer.rule(self._element(writer, name_, value, shared, field, strict)) + "*")
        return result

    def _element(
        self,
        writer: GrammarWriter,
        name: str,
        schema: Any,
        shared: Mapping[str, Any],
        field: str,
        strict: bool,
    ) -> str:
        """A parameter: as plain text where the schema takes any string, as JSON where it takes more."""
        begin = writer.literal(f'<{DSML}{self._gap}parameter name="')
        end_tag = self._end_tag("parameter") + "\n"
        end = writer.literal(end_tag)
        kinds = []
        strings, takes_more = string_part(schema)
        if strings is not None:
            listed = " | ".join(f"{writer.plain(each)} {end}" for each in strings)
            kinds.append(f"{writer.plain(AS_TEXT)} ({listed or writer.text_before(end_tag)})")
        if takes_more:
            schema = {**schema, **shared} if isinstance(schema, Mapping) else {}
            kinds.append(f"{writer.plain(AS_JSON)} {writer.json(schema, field, lenient=not strict)} {end}")
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


def string_part(schema: Any) -> tuple[list[str] | None, bool]:
    """What a schema takes as plain text, and whether it takes anything else.

    The first is None for no string, the empty list for every string, else the strings. Strings that
    are limited in other ways (a pattern, a length) are left to JSON.
    """
    if not isinstance(schema, Mapping) or not schema.keys() - ANNOTATIONS:
        return [], True
    keywords = schema.keys() - ANNOTATIONS
    if keywords <= {"type", "enum"} and "enum" in keywords or keywords <= {"type", "const"} and "const" in keywords:
        values = schema["enum"] if "enum" in keywords else [schema["const"]]
        strings = [value for value in values if isinstance(value, str)]
        return (strings or None), len(strings) < len(values)
    if keywords == {"type"}:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return ([] if "string" in types else None), types != ["string"]
    if keywords == {"anyOf"} and isinstance(schema["anyOf"], list):
        return ([] if any(string_part(each)[0] == [] for each in schema["anyOf"]) else None), True
    return None, True


def _attribute(name: str, field: str) -> str:
    if re.search(r'["<>&\n｜]', name):
        raise RequestError(
            f"{field}: the name {name!r} has a character that this model's tool calls cannot carry", param=field
        )
    return name


def _field(index: int) -> str:
    return f"tools[{index}].function.parameters"
