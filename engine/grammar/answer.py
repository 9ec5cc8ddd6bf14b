"""What an answer must look like, from the fields of a request that say so.

`response_format` and `structured_outputs` describe the content, `tool_choice` and strict tools the
calls. A model that thinks first may think freely; the grammar binds what comes behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from engine.chat.output_parser import END_THINK, THINK
from engine.grammar.lark import Grammar, GrammarWriter
from engine.grammar.tools import CallSpelling, is_strict


class Reasoning(Enum):
    """How an answer begins."""

    NONE = "content comes at once"
    POSSIBLE = "the model may open its reasoning"
    OPEN = "the prompt has opened it"
    MESSAGES = "it is written in messages of its own"


@dataclass(frozen=True)
class AnswerStyle:
    """How a dialect writes answers.

    calls       how it writes tool calls; None where it has no tools
    in_calls    True where the prompt has begun the first call already
    gap         what stands between content, perhaps none, and the first call
    think       the tags around reasoning, or what messages of it begin and end with
    content     what content begins with
    binds_calls calls follow the tools' schemas even where no tool asks for it
    """

    reasoning: Reasoning = Reasoning.NONE
    calls: CallSpelling | None = None
    in_calls: bool = False
    gap: str = ""
    think: tuple[str, str] = (THINK, END_THINK)
    content: str = ""
    binds_calls: bool = False


def content_grammar(request: Mapping[str, Any], added_tokens: Mapping[str, int]) -> Grammar | None:
    """The grammar of an answer that is all content; None where the request asks for nothing special."""
    writer = GrammarWriter(added_tokens)
    content = _content(writer, request)
    return None if content is None else writer.finished(content)


def answer_grammar(
    request: Mapping[str, Any], added_tokens: Mapping[str, int], style: AnswerStyle
) -> Grammar | None:
    """The grammar of an answer to a chat; None where the request binds nothing.

    Raises RequestError for a tool whose schema the dialect cannot write.
    """
    writer = GrammarWriter(added_tokens)
    content = _content(writer, request)
    calls = _calls(writer, request, style, content is not None)
    if content is None and calls is None:
        return None
    if calls is not None and must_call(request):
        body = calls
    else:
        free = content or writer.text_without(style.calls.begin if style.calls else "")
        body = f"{writer.literal(style.content)} {free}" if style.content else free
        body = body if calls is None else f"({body} | {calls})"
    begin, end = style.think
    match style.reasoning:
        case Reasoning.OPEN:
            return writer.finished(f"{writer.text_before(end)} {body}")
        case Reasoning.POSSIBLE:
            return writer.finished(f"({writer.literal(begin)} {writer.text_before(end)})? {body}")
        case Reasoning.MESSAGES:
            return writer.finished(f"({writer.literal(begin)} {writer.text_before(end)})* {body}")
    return writer.finished(body)


def must_call(request: Mapping[str, Any]) -> bool:
    """Whether the answer has to be a tool call."""
    choice = request.get("tool_choice")
    return choice == "required" or isinstance(choice, Mapping)


def _offered_tools(request: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The tools that an answer may call."""
    tools, choice = request.get("tools") or (), request.get("tool_choice")
    if choice == "none":
        return ()
    if isinstance(choice, Mapping):
        return [tool for tool in tools if tool["function"]["name"] == choice["function"]["name"]]
    return list(tools)


def _content(writer: GrammarWriter, request: Mapping[str, Any]) -> str | None:
    wanted = request.get("structured_outputs") or {}
    for name, value in wanted.items():
        field = f"structured_outputs.{name}"
        match name:
            case "json":
                return writer.json(value, field)
            case "json_object":
                return writer.json({"type": "object"}, field)
            case "regex":
                return writer.regex(value, field)
            case "choice":
                return f"({' | '.join(map(writer.plain, value))})"
            case "grammar":
                return writer.lark(value, field)
    format_ = request.get("response_format") or {"type": "text"}
    if format_["type"] == "json_object":
        return writer.json({"type": "object"}, "response_format")
    if format_["type"] == "json_schema":
        described = format_["json_schema"]
        lenient = described.get("strict") is False
        return writer.json(described["schema"], "response_format.json_schema.schema", lenient=lenient)
    return None


def _calls(
    writer: GrammarWriter, request: Mapping[str, Any], style: AnswerStyle, content_is_bound: bool
) -> str | None:
    tools = _offered_tools(request)
    if not tools or style.calls is None:
        return None
    must = must_call(request)
    if not (must or content_is_bound or style.binds_calls or any(map(is_strict, tools))):
        return None
    is_named = isinstance(request.get("tool_choice"), Mapping)
    several = request.get("parallel_tool_calls") is not False and not is_named
    calls = style.calls.calls(writer, tools, several=several)
    if style.in_calls:
        return calls
    if must or content_is_bound or style.calls.alone:
        return f"{writer.literal(style.gap + style.calls.begin)} {calls}"
    return f"{writer.text_before(style.calls.begin)} {calls}"
