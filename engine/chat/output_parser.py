"""Generated text to message deltas: reasoning, content and tool calls."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.chat.call_forms import CallBlock, CallForm, CallPiece, Schemas
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


class TagParser(OutputParser):
    """A parser that goes by tags, and numbers the calls that it tells."""

    def __init__(self, tags: Collection[str], tokens: Collection[str]) -> None:
        self._finder = TagFinder(tags, tokens)
        self._calls = 0

    @property
    def has_tool_calls(self) -> bool:
        return self._calls > 0

    def push(self, text: str, special_ranges: SpecialRanges | None = None) -> list[MessageDelta]:
        return self._read(self._finder.push(text, special_ranges))

    @abstractmethod
    def _read(self, items: Iterable[Item]) -> list[MessageDelta]:
        """What is certain after these items."""

    def _call(self, arguments: str, name: str | None = None, call_id: str | None = None) -> MessageDelta:
        """A piece of a call; one with a name begins the next call, whose id is made where it has none."""
        if name is not None:
            self._calls += 1
            call_id = call_id or f"call_{uuid.uuid4().hex}"
        return MessageDelta(tool_calls=(ToolCallDelta(self._calls - 1, arguments, call_id, name),))


THINK, END_THINK = "<think>", "</think>"


class TaggedParser(TagParser):
    """Reasoning between a pair of tags, and tool calls in one of the forms that tags set off.

    reasoning     an answer may begin with the first of `think`
    in_reasoning  the prompt has opened it already
    calls         how tool calls are written; None where none are looked for
    schemas       of the tools that may be called
    tokens        spellings of the vocabulary's added tokens: a tag among them is that token
    think         the tags around reasoning

    Nothing that may become a tag is let through, and line breaks next to a tag belong to it.
    """

    def __init__(
        self,
        *,
        reasoning: bool,
        in_reasoning: bool,
        calls: CallForm | None,
        schemas: Schemas | None = None,
        tokens: Collection[str] = (),
        think: tuple[str, str] = (THINK, END_THINK),
    ) -> None:
        super().__init__([*(think if reasoning else ()), *(calls.tags if calls else ())], tokens)
        self._think, self._end_think = think
        self._form = calls
        self._schemas = schemas or {}
        self._state = "reasoning" if in_reasoning else "start" if reasoning else "content"
        self._may_be_bare = calls is not None and calls.is_bare
        self._after_tag = in_reasoning
        self._held = ""  # white space that a tag may follow
        self._block: CallBlock | None = None

    def finish(self) -> list[MessageDelta]:
        deltas = self._read(self._finder.finish())
        while self._block is not None:
            pieces, rest = self._block.finish()
            deltas += self._pieces(pieces) + self._read(rest)
        held, self._held = self._held, ""
        return deltas + self._text(held)

    def _read(self, items: Iterable[Item]) -> list[MessageDelta]:
        queue = deque(items)
        deltas: list[MessageDelta] = []
        while queue:
            item = queue.popleft()
            if self._block is not None:
                pieces, rest = self._block.read(item)
                deltas += self._pieces(pieces)
                queue.extendleft(reversed(rest))
            elif isinstance(item, Tag):
                deltas += self._pass(item.spelling)
            elif self._may_be_bare and self._state != "reasoning" and not item.strip():
                self._held += item
            elif self._begins_bare_call(item):
                space = item[: len(item) - len(item.lstrip())]
                self._held = (self._held + space).lstrip("\n" if self._after_tag else "")
                self._open("")
                queue.appendleft(item.lstrip())
            else:
                deltas += self._say(item)
        return deltas

    def _begins_bare_call(self, text: str) -> bool:
        """Whether the answer begins with what may be a call without a tag."""
        if not self._may_be_bare or self._state == "reasoning" or not (begun := text.lstrip()):
            return False
        self._may_be_bare = False
        return begun.startswith("{")

    def _opens_calls(self, tag: str) -> bool:
        form = self._form
        if form is None or tag not in form.openers:
            return False
        return form.ends_reasoning or self._state != "reasoning"

    def _open(self, opener: str) -> None:
        assert self._form is not None
        self._state, self._block = "content", self._form.block(opener, self._schemas)

    def _pass(self, tag: str) -> list[MessageDelta]:
        """Go over a tag into another state; one that means nothing here is text."""
        if self._state == "start" and tag == self._think:
            self._state = "reasoning"
        elif self._state == "reasoning" and tag == self._end_think:
            self._state = "content"
        elif self._opens_calls(tag):
            if self._state == "reasoning":
                self._held, self._after_tag = "", True
            self._state = "content"
            deltas = self._say("")
            self._open(tag)
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
        if self._form is not None or self._state == "reasoning":
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
        ends_with_call = True
        for piece in pieces:
            ends_with_call = isinstance(piece, CallPiece)
            if isinstance(piece, str):
                deltas.append(MessageDelta(content=self._held + piece))
            else:
                deltas.append(self._call(piece.arguments, piece.name, piece.id))
            self._held = ""
        if self._block is not None and self._block.has_ended:
            self._after_tag = self._block.has_calls and ends_with_call
            self._block = None
        return deltas
