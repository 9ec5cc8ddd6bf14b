"""Generated text to message deltas: reasoning, content and tool calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


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
