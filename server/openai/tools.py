"""Tools as clients know them, and the functions that the model knows.

A model calls functions. Tools whose input is free text become functions of one argument, namespaces are
flattened, and tools that another vendor's server would run are left out: no model here can call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.grammar.tools import LARK
from quant.errors import RequestError
from server.serving.call_input import call_input, written_input

INPUT = "input"  # the argument of a tool that takes text
SEPARATOR = "__"  # between a namespace and a name in it
MAX_NAME = 256  # of a function: a namespace and a name of the longest that clients send


@dataclass(frozen=True)
class Origin:
    """What a client calls a function of the model.

    is_custom   its input is text: the one argument of the function
    """

    name: str
    namespace: str | None = None
    is_custom: bool = False

    @property
    def function(self) -> str:
        """The function's name."""
        return f"{self.namespace}{SEPARATOR}{self.name}" if self.namespace else self.name


Origins = Mapping[str, Origin]


def origin_of(name: str, origins: Origins) -> Origin:
    """What the client calls the function `name`; models also call what nobody offered."""
    return origins.get(name) or Origin(name)


def custom_function(tool: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The function for a tool that takes text, perhaps by a grammar, which its calls are then held to.

    Raises RequestError naming a part of `field`, the tool's place, for a format that is not understood.
    """
    argument = {"type": "string", "description": "The whole input, as text"}
    limit = _limit(tool.get("format"), f"{field}.format")
    schema = {"type": "object", "properties": {INPUT: argument | limit}, "required": [INPUT]}
    return {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": schema | {"additionalProperties": False},
        "strict": bool(limit) or None,
    }


def _limit(wanted: Any, field: str) -> dict[str, str]:
    """What the schema of the input says of a custom tool's `format`: nothing for text."""
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping) or wanted.get("type") not in ("text", "grammar"):
        raise RequestError(f"{field}.type must be text or grammar", param=f"{field}.type")
    if wanted["type"] == "text":
        return {}
    if "grammar" in wanted:  # one level deeper in Chat Completions than in Responses
        wanted, field = wanted["grammar"], f"{field}.grammar"
    given = wanted if isinstance(wanted, Mapping) else {}
    definition = given.get("definition")
    if given.get("syntax") not in ("lark", "regex"):
        raise RequestError(f"{field}.syntax must be lark or regex", param=f"{field}.syntax")
    if not isinstance(definition, str) or not definition:
        text = f"{field}.definition must be the text of a grammar"
        raise RequestError(text, param=f"{field}.definition")
    return {LARK: definition} if given["syntax"] == "lark" else {"pattern": f"^(?:{definition})$"}


def shown_tools(body: Any) -> tuple[Any, list[str], set[str]]:
    """A chat request, still as it was sent, with functions for tools; the types left out, and the names of
    the functions that stand for tools which take text. What is wrong with it stays so, but for what
    `custom_function` raises."""
    tools = body.get("tools") if isinstance(body, dict) else None
    if not isinstance(tools, list):
        return body, [], set()
    shown: list[Any] = []
    ignored: list[str] = []
    custom: set[str] = set()
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind == "custom" and isinstance(described := tool.get("custom"), Mapping):
            function = custom_function(described, f"tools[{i}].custom")
            shown.append({"type": "function", "function": function})
            custom.add(str(described.get("name")))
        elif isinstance(kind, str) and kind not in ("function", "custom"):
            ignored.append(kind)
        else:
            shown.append(tool)
    choice = body.get("tool_choice")
    if custom and isinstance(choice, Mapping) and choice.get("type") == "custom":
        choice = {"type": "function", "function": choice.get("custom")}
    changed = {"tools": shown} | ({} if choice is body.get("tool_choice") else {"tool_choice": choice})
    return (body | changed if ignored or custom else body), ignored, custom


def custom_input(arguments: str) -> str:
    """The text that a call with these arguments hands to its tool."""
    given = call_input(arguments)
    text = given.get(INPUT, given.get("arguments"))
    return text if isinstance(text, str) else arguments


def custom_arguments(text: str) -> str:
    """The arguments of a call of the history whose tool took `text`."""
    return written_input({INPUT: text})


def listed(types: Iterable[str]) -> str:
    """Kinds of tools, each once, as a header takes them."""
    plain = (kind.encode("ascii", "replace").decode() for kind in dict.fromkeys(types))
    return ", ".join("".join(c if c.isprintable() else "?" for c in kind)[:64] for kind in plain)
