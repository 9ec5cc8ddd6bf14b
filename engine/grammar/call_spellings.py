"""The spellings of tool calls as grammars: each writes what its reader in `engine/chat` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from engine.grammar.lark import GrammarWriter, escaped
from engine.grammar.schema import types_of
from engine.grammar.tools import (
    ANNOTATIONS,
    CallSpelling,
    arguments_schema,
    checked_name,
    field_of,
    format_field,
    is_strict,
    lark_of,
    properties_of,
    string_part,
    within,
)
from quant.errors import RequestError

DSML = "｜DSML｜"
LONGEST_COUNTED = 1000  # characters of a string whose length a grammar counts

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class JsonSpelling(CallSpelling):
    """Objects of name and arguments: `begin before {...} (between {...})* after`."""

    begin: str
    before: str = ""
    between: str = ", "
    after: str = ""
    arguments: str = "arguments"
    alone: bool = False

    def calls(self, writer: GrammarWriter, tools: Tools, *, several: bool) -> str:
        def call(begun: str) -> str:
            bodies = []
            for i, tool in enumerate(tools):
                name = json.dumps(tool["function"]["name"], ensure_ascii=False)
                head = f'{{"name": {name}, "{self.arguments}": '.removeprefix(begun)
                bodies.append(f"{writer.plain(head)} {_arguments(writer, i, tool)} {writer.plain('}')}")
            return writer.rule(" | ".join(bodies))

        first = call(self.begin)  # a bare object begins with its own first characters
        more = f"({writer.literal(self.between)} {call('')})*" if several else ""
        return f"{writer.literal(self.before)} {first} {more} {writer.literal(self.after)}"


@dataclass(frozen=True)
class SectionSpelling(CallSpelling):
    """Heads and arguments set off by tokens: `begin (before NAME behind {...} end_call)* end`.

    between     what stands between calls
    numbers     a colon and a number follow the name
    alone       as in every spelling; an answer then has one call
    """

    begin: str
    behind: str
    before: str = ""
    end_call: str = ""
    between: str = ""
    end: str = ""
    numbers: bool = False
    alone: bool = False

    def calls(self, writer: GrammarWriter, tools: Tools, *, several: bool) -> str:
        number = f"{writer.plain(':')} /[0-9]{{1,4}}/ " if self.numbers else ""
        bodies = []
        for i, tool in enumerate(tools):
            name = writer.plain(checked_name(tool["function"]["name"], field_of(i)))
            bodies.append(f"{name} {number}{writer.literal(self.behind)} {_arguments(writer, i, tool)}")
        listed = " | ".join(bodies)
        call = writer.rule(f"{writer.literal(self.before)} ({listed}) {writer.literal(self.end_call)}")
        more = f" ({writer.literal(self.between)} {call})*" if several and not self.alone else ""
        return f"{call}{more} {writer.literal(self.end)}"


@dataclass(frozen=True)
class ElementSpelling(CallSpelling):
    """One element a parameter, in which strings stand as they are and all else as JSON:
    `begin (call NAME behind_name (parameter KEY as_text VALUE end_parameter)* end_call)* end`.

    as_text, as_json    what stands between a key and its value
    padding             what stands between a value and `end_parameter`
    between             what stands between calls
    """

    begin: str
    call: str
    behind_name: str
    parameter: str
    as_text: str
    as_json: str
    end_parameter: str
    end_call: str
    end: str
    padding: str = ""
    behind_parameter: str = "\n"
    between: str = ""

    def calls(self, writer: GrammarWriter, tools: Tools, *, several: bool) -> str:
        call = writer.rule(" | ".join(self._invocation(writer, i, tool) for i, tool in enumerate(tools)))
        more = f" ({writer.literal(self.between)} {call})*" if several else ""
        return f"{call}{more} {writer.literal(self.end)}"

    def _invocation(self, writer: GrammarWriter, index: int, tool: Mapping[str, Any]) -> str:
        """A call of one tool: its parameters in the schema's order, then others where it lets them in."""
        field, schema, strict = field_of(index), arguments_schema(tool), is_strict(tool)
        properties, required = properties_of(schema, field, strict)

        def parameter(name: str, *place: str) -> str:
            part = within(schema, *place)
            at = format_field(index) if lark_of(part) else field
            return writer.rule(self._parameter(writer, name, part, at, strict))

        name = checked_name(tool["function"]["name"], field)
        parts = [writer.literal(self.call + name + self.behind_name)]
        for key in properties:
            element = parameter(writer.plain(checked_name(key, field)), "properties", key)
            parts.append(element if key in required else f"{element}?")
        if schema.setdefault("additionalProperties", True) is not False:
            known = "".join(f" & ~/{escaped(key)}/" for key in properties)
            other = writer.terminal(f"/[A-Za-z0-9_.-]{{1,64}}/{known}")
            parts.append(parameter(other, "additionalProperties") + "*")
        return writer.rule(" ".join([*parts, writer.literal(self.end_call)]))

    def _parameter(self, writer: GrammarWriter, name: str, schema: Any, field: str, strict: bool) -> str:
        """A parameter: as plain text where the schema takes strings, as JSON where it takes more."""
        end = writer.literal(self.padding + self.end_parameter + self.behind_parameter)
        kinds = []
        strings, takes_more = string_part(schema)
        if grammar := lark_of(schema):
            if self.as_text != self.as_json:
                kinds.append(f"{writer.literal(self.as_json)} {_quoted(writer, grammar, field)} {end}")
            else:
                limit = writer.lark_terminal(grammar, field)
                text = writer.limited_before(self.end_parameter, limit, self.padding)
                kinds.append(f"{writer.literal(self.as_text)} {text} {writer.literal(self.behind_parameter)}")
            takes_more = False
        elif self.as_text == self.as_json and types_of(schema) == {"string"} and strings is None:
            # Nothing would tell quotes from text, so what limits the string must limit the text.
            limited = _limited(schema, field, strict)
            text = writer.limited_before(self.end_parameter, limited, self.padding)
            kinds.append(f"{writer.literal(self.as_text)} {text} {writer.literal(self.behind_parameter)}")
            takes_more = False
        elif strings is not None:
            listed = " | ".join(f"{writer.plain(each)} {end}" for each in strings)
            free = f"{writer.text_before(self.end_parameter)} {writer.literal(self.behind_parameter)}"
            kinds.append(f"{writer.literal(self.as_text)} ({listed or free})")
        if takes_more:
            value = schema if isinstance(schema, Mapping) else {}
            part = writer.json(value, field, lenient=not strict)
            kinds.append(f"{writer.literal(self.as_json)} {part} {end}")
        return f"{writer.literal(self.parameter)} {name} ({' | '.join(kinds)})"


def dsml(block: str, gap: str = "") -> ElementSpelling:
    """DeepSeek's: `block` is the name of the element around all calls, `gap` stands in front of each name."""
    return ElementSpelling(
        begin=f"<{DSML}{gap}{block}>\n",
        call=f'<{DSML}{gap}invoke name="',
        behind_name='">\n',
        parameter=f'<{DSML}{gap}parameter name="',
        as_text='" string="true">',
        as_json='" string="false">',
        end_parameter=f"</{DSML}{gap}parameter>",
        end_call=f"</{DSML}{gap}invoke>\n",
        end=f"</{DSML}{gap}{block}>",
    )


def _arguments(writer: GrammarWriter, index: int, tool: Mapping[str, Any]) -> str:
    schema, field = arguments_schema(tool), field_of(index)
    for name, each in schema.get("properties", {}).items():
        if grammar := lark_of(each):
            head = f"{{{json.dumps(name)}: "
            quoted = _quoted(writer, grammar, format_field(index))
            return f"{writer.plain(head)} {quoted} {writer.plain('}')}"
    return writer.json(schema, field, lenient=not is_strict(tool))


def _quoted(writer: GrammarWriter, grammar: str, field: str) -> str:
    """A JSON string whose value follows a client's grammar."""
    quote = writer.plain('"')
    return f"{quote} {writer.quoted_lark(grammar, field)} {quote}"


def _limited(schema: Mapping[str, Any], field: str, strict: bool) -> str:
    """A pattern of the strings that a schema takes, as text.

    Raises RequestError for a limit that is no pattern or length, where it must be enforced.
    """
    other = sorted(schema.keys() - ANNOTATIONS - {"type", "pattern", "minLength", "maxLength"})
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    uncounted = max(least, most or 0) > LONGEST_COUNTED
    if strict and (other or uncounted):
        what = f"{other}" if other else f"a length of more than {LONGEST_COUNTED}"
        raise RequestError(f"{field}: {what} cannot be enforced for text in this model's calls", param=field)
    parts = [] if uncounted or (not least and most == "") else [f"/(.|\\n){{{least},{most}}}/"]
    if isinstance(pattern := schema.get("pattern"), str):
        before = "" if pattern.startswith("^") else "(.|\\n)*"
        behind = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(.|\\n)*"
        core = pattern.removeprefix("^").removesuffix("$" if not behind else "")
        parts.append(f"/{before}({llguidance.regex_to_lark(core, 'dws')}){behind}/")
    return " & ".join(parts) or "/(.|\\n)*/"
