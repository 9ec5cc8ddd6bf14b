"""Generated text to message deltas: reasoning, content and tool calls."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.chat.call_block import END_TOOL_CALL, TOOL_CALL, CallBlock, CallPiece
from engine.chat.tags import Item, SpecialRanges, Tag, TagFinder


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
    def push(self, text: str, special_ranges: SpecialRanges | None = None) -> list[MessageDelta]:
        """Deltas that are certain after `text`, in which added tokens wrote the `special_ranges`.

        None where that is not known; tags are then told by their spelling alone.
        """

    @abstractmethod
    def finish(self) -> list[MessageDelta]:
        """What was held back; call once at the end."""

    @property
    @abstractmethod
    def has_tool_calls(self) -> bool:
        """True once a tool call was seen, so that the finish reason is `tool_calls`."""


class PlainParser(OutputParser):
    """Everything is content."""

    def push(self, text: str, special_ranges: SpecialRanges | None = None) -> list[MessageDelta]:
        return [MessageDelta(content=text)] if text else []

    def finish(self) -> list[MessageDelta]:
        return []

    @property
    def has_tool_calls(self) -> bool:
        return False


THINK, END_THINK = "<think>", "</think>"


class TaggedParser(OutputParser):
    """Reasoning between `<think>` tags and tool calls as `<tool_call>{"name", "arguments"}</tool_call>`.

    reasoning     an answer may begin with `<think>`
    in_reasoning  the prompt has opened it already
    tools         tool calls are looked for
    tokens        spellings of the vocabulary's added tokens: a tag among them is that token

    Nothing that may become a tag is let through, and line breaks next to a tag belong to it.
    """

    def __init__(
        self, *, reasoning: bool, in_reasoning: bool, tools: bool, tokens: Collection[str] = ()
    ) -> None:
        tags = [*((THINK, END_THINK) if reasoning else ()), *((TOOL_CALL, END_TOOL_CALL) if tools else ())]
        self._finder = TagFinder(tags, tokens)
        self._tools = tools
        self._state = "reasoning" if in_reasoning else "start" if reasoning else "content"
        self._after_tag = in_reasoning
        self._held = ""  # white space that a tag may follow
        self._block = CallBlock()
        self._calls = 0

    @property
    def has_tool_calls(self) -> bool:
        return self._calls > 0

    def push(self, text: str, special_ranges: SpecialRanges | None = None) -> list[MessageDelta]:
        return self._read(self._finder.push(text, special_ranges))

    def finish(self) -> list[MessageDelta]:
        deltas = self._read(self._finder.finish())
        while self._state == "call":
            deltas += self._told(*self._block.finish())
        held, self._held = self._held, ""
        return deltas + self._text(held)

    def _read(self, items: Iterable[Item]) -> list[MessageDelta]:
        queue = deque(items)
        deltas: list[MessageDelta] = []
        while queue:
            item = queue.popleft()
            if self._state == "call":
                pieces, rest = self._block.read(item)
                deltas += self._pieces(pieces)
                queue.extendleft(reversed(rest))
            else:
                deltas += self._pass(item.spelling) if isinstance(item, Tag) else self._say(item)
        return deltas

    def _told(self, pieces: Iterable[CallPiece | str], rest: Iterable[Item]) -> list[MessageDelta]:
        return self._pieces(pieces) + self._read(rest)

    def _pass(self, tag: str) -> list[MessageDelta]:
        """Go over a tag into another state; one that means nothing here is text."""
        if self._state == "start" and tag == THINK:
            self._state = "reasoning"
        elif self._state == "reasoning" and tag == END_THINK:
            self._state = "content"
        elif self._state != "reasoning" and tag == TOOL_CALL:
            self._state = "content"
            deltas = self._say("")
            self._state, self._block = "call", CallBlock()
            return deltas  # line breaks wait: they are text before what turns out to be no call
        else:
            return self._say(tag)
        self._held, self._after_tag = "", True
        return []

    def _say(self, text: str) -> list[MessageDelta]:
        """Tell `text`, but for white space at its end that a tag may follow."""
        text, self._held = self._held + text, ""
        if self._state == "start":
            if not text.strip():
                self._held = text
                return []
            self._state = "content"
        if self._tools or self._state == "reasoning":
            certain = text.rstrip("\n")
            text, self._held = certain, text[len(certain) :]
        return self._text(text)

    def _text(self, text: str) -> list[MessageDelta]:
        if self._after_tag:
            text = text.lstrip("\n")
        if not text:
            return []
        self._after_tag = False
        return [MessageDelta(reasoning=text) if self._state == "reasoning" else MessageDelta(content=text)]

    def _pieces(self, pieces: Iterable[CallPiece | str]) -> list[MessageDelta]:
        """What a block of calls told; the state behind it, where it has ended."""
        deltas = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas.append(MessageDelta(content=self._held + piece))
            elif piece.name is None:
                deltas.append(_call(ToolCallDelta(self._calls - 1, piece.arguments)))
            else:
                call_id = f"call_{uuid.uuid4().hex}"
                deltas.append(_call(ToolCallDelta(self._calls, piece.arguments, call_id, piece.name)))
                self._calls += 1
            self._held = ""
        if self._block.has_ended:
            self._state, self._after_tag = "content", self._block.has_calls
        return deltas


def _call(delta: ToolCallDelta) -> MessageDelta:
    return MessageDelta(tool_calls=(delta,))
