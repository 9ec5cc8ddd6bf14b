"""Generated text to message deltas: reasoning, content and tool calls."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass

from engine.chat.call_reader import ObjectReader, read_head


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call; `id` and `name` come with its first piece."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class MessageDelta:
    """What a piece of text adds to the message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class OutputParser(ABC):
    """Turns the text of one answer into message deltas, piece by piece."""

    @abstractmethod
    def push(self, text: str) -> list[MessageDelta]:
        """Deltas that are certain after `text`."""

    @abstractmethod
    def finish(self) -> list[MessageDelta]:
        """What was held back; call once at the end."""

    @property
    @abstractmethod
    def has_tool_calls(self) -> bool:
        """True once a tool call was seen, so that the finish reason is `tool_calls`."""


class PlainParser(OutputParser):
    """Everything is content."""

    def push(self, text: str) -> list[MessageDelta]:
        return [MessageDelta(content=text)] if text else []

    def finish(self) -> list[MessageDelta]:
        return []

    @property
    def has_tool_calls(self) -> bool:
        return False


THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"


class TaggedParser(OutputParser):
    """Reasoning between `<think>` tags and tool calls as `<tool_call>{"name", "arguments"}</tool_call>`.

    reasoning     an answer may begin with `<think>`
    in_reasoning  the prompt has opened it already
    tools         tool calls are looked for

    Nothing that may become a tag is let through, and line breaks next to a tag belong to it. Arguments are
    passed on as they are written, once the name is known; a call that does not begin with its name is read
    when it is complete, and what is none stays content.
    """

    def __init__(self, *, reasoning: bool, in_reasoning: bool, tools: bool) -> None:
        self._tools = tools
        self._state = "reasoning" if in_reasoning else "start" if reasoning else "content"
        self._after_tag = in_reasoning
        self._pending = ""
        self._calls = 0
        self._arguments = ObjectReader()

    @property
    def has_tool_calls(self) -> bool:
        return self._calls > 0

    def push(self, text: str) -> list[MessageDelta]:
        self._pending += text
        if self._state == "start" and not self._has_begun():
            return []
        deltas: list[MessageDelta] = []
        while True:
            if self._state == "tool_call":
                deltas += self._begun_call()
            elif self._state == "arguments":
                deltas += self._more_arguments()
            tag = self._tag()
            if not tag or tag not in self._pending:
                break
            before, _, self._pending = self._pending.partition(tag)
            if self._state == "tool_call":
                deltas += self._call(before, tag)
            elif self._state != "call_end":
                deltas += self._text(before.rstrip("\n"))
            self._state = "tool_call" if tag == TOOL_CALL else "content"
            self._after_tag = True
        if self._state in ("content", "reasoning"):
            certain = _before_possible_tag(self._pending, tag)
            self._pending = self._pending[len(certain) :]
            deltas += self._text(certain)
        return deltas

    def finish(self) -> list[MessageDelta]:
        rest, self._pending = self._pending, ""
        if self._state in ("arguments", "call_end"):
            return []
        return self._call(rest, "") if self._state == "tool_call" else self._text(rest)

    def _has_begun(self) -> bool:
        """Whether it is decided how the answer begins: with `<think>`, or not."""
        begin = self._pending.lstrip()
        if begin.startswith(THINK):
            self._state, self._after_tag, self._pending = "reasoning", True, begin.removeprefix(THINK)
        elif not THINK.startswith(begin):
            self._state = "content"
        return self._state != "start"

    def _tag(self) -> str:
        """The tag that ends the current state; empty for none."""
        if self._state == "content":
            return TOOL_CALL if self._tools else ""
        if self._state == "arguments":
            return ""
        return END_THINK if self._state == "reasoning" else END_TOOL_CALL

    def _text(self, text: str) -> list[MessageDelta]:
        if self._after_tag:
            text = text.lstrip("\n")
        if not text:
            return []
        self._after_tag = False
        return [MessageDelta(reasoning=text) if self._state == "reasoning" else MessageDelta(content=text)]

    def _begun_call(self) -> list[MessageDelta]:
        """The call that is pending, once it is known which it is, with what there is of its arguments."""
        head = read_head(self._pending)
        if head is None:
            return []
        self._pending = self._pending[head.stop :]
        self._state, self._arguments = "arguments", ObjectReader()
        return [self._new_call(head.name, self._taken_arguments())]

    def _more_arguments(self) -> list[MessageDelta]:
        arguments = self._taken_arguments()
        return [MessageDelta(tool_calls=(ToolCallDelta(self._calls - 1, arguments),))] if arguments else []

    def _taken_arguments(self) -> str:
        """What is pending of the arguments; behind them only the closing tag is looked for."""
        count = self._arguments.take(self._pending)
        arguments, self._pending = self._pending[:count], self._pending[count:]
        if self._arguments.has_ended:
            self._state = "call_end"
        return arguments

    def _new_call(self, name: str, arguments: str) -> MessageDelta:
        delta = ToolCallDelta(self._calls, arguments, id=f"call_{uuid.uuid4().hex}", name=name)
        self._calls += 1
        return MessageDelta(tool_calls=(delta,))

    def _call(self, body: str, closing: str) -> list[MessageDelta]:
        call = _parse_call(body)
        if call is None:
            return [MessageDelta(content=TOOL_CALL + body + closing)]
        return [self._new_call(*call)]


def _before_possible_tag(text: str, tag: str) -> str:
    """`text` without an end that `tag` may grow from, nor the line breaks before that end."""
    if not tag:
        return text
    part = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
    return text[: len(text) - part].rstrip("\n")


def _parse_call(body: str) -> tuple[str, str] | None:
    """Name and arguments (JSON text) of a tool call; None where `body` is not one."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call["name"], arguments
