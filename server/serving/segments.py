"""An answer split into segments of reasoning or text, and tool calls.

Responses calls them items, Messages calls them content blocks; both stream them one after the other, each
with a start and an end event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.chat.output_parser import MessageDelta, ToolCallDelta

Event = dict[str, Any]
Kind = Literal["reasoning", "text", "call"]


@dataclass
class AnswerSegment:
    """One segment. `pieces` concatenate to its text, or to the arguments of its call."""

    kind: Kind
    index: int
    call: ToolCallDelta | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Text, or the arguments of a call."""
        return "".join(self.pieces)


class SegmentWriter(ABC):
    """Turns the deltas of one answer into segments, and segments into a protocol's events."""

    def __init__(self) -> None:
        self._open: AnswerSegment | None = None
        self._begun = 0

    def add(self, delta: MessageDelta) -> Iterator[Event]:
        """Events for `delta`."""
        if delta.reasoning:
            yield from self._write("reasoning", delta.reasoning)
        if delta.content:
            yield from self._write("text", delta.content)
        for call in delta.tool_calls:
            if call.id is not None:
                yield from self._begin("call", call)
            yield from self._write("call", call.arguments)

    def close(self, cut_off: bool = False) -> Iterator[Event]:
        """Events that end the current segment; `cut_off` if the answer ended before the segment did."""
        segment, self._open = self._open, None
        if segment is not None:
            yield from self.ended(segment, cut_off)

    @abstractmethod
    def begun(self, segment: AnswerSegment) -> Iterator[Event]:
        """Events that start a segment."""

    @abstractmethod
    def grown(self, segment: AnswerSegment, text: str) -> Iterator[Event]:
        """Events for `text`, already part of the segment."""

    @abstractmethod
    def ended(self, segment: AnswerSegment, cut_off: bool) -> Iterator[Event]:
        """Events that end a segment."""

    def _begin(self, kind: Kind, call: ToolCallDelta | None = None) -> Iterator[Event]:
        yield from self.close()
        self._open = AnswerSegment(kind, self._begun, call)
        self._begun += 1
        yield from self.begun(self._open)

    def _write(self, kind: Kind, text: str) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        if text:
            self._open.pieces.append(text)
            yield from self.grown(self._open, text)
