"""The output of a Responses answer as it grows: items, and the events that tell how each came about."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.output_parser import MessageDelta, ToolCallDelta

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]


Kind = Literal["reasoning", "message", "function_call"]


@dataclass
class Item:
    """One item of the output. `kind` says what it is; `pieces` add up to its text or arguments."""

    kind: Kind
    index: int
    id: str
    call: ToolCallDelta | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Text, or the arguments of a call."""
        return "".join(self.pieces)

    def part(self, text: str) -> dict[str, Any]:
        """`text` as the content part that such an item has."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def as_json(self, status: Status) -> dict[str, Any]:
        """The item as clients see it."""
        shown: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.call is not None:
            return shown | {"call_id": self.call.id, "name": self.call.name, "arguments": self.text}
        content = [self.part(self.text)] if self.pieces else []
        if self.kind == "reasoning":
            return shown | {"summary": [], "content": content}
        return shown | {"role": "assistant", "content": content}


_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_STREAMS = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


class OutputItems:
    """Turns the deltas of one answer into items; `done` holds those that are finished."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: Item | None = None

    def add(self, delta: MessageDelta) -> Iterator[Event]:
        """Events of what `delta` adds."""
        if delta.reasoning:
            yield from self._write("reasoning", delta.reasoning)
        if delta.content:
            yield from self._write("message", delta.content)
        for call in delta.tool_calls:
            if call.id is not None:
                yield from self.close("completed")
                yield from self._begin("function_call", call)
            yield from self._write("function_call", call.arguments)

    def close(self, status: Status) -> Iterator[Event]:
        """Events that end the item being written, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        shown = item.as_json(status)
        self.done.append(shown)
        stream = _STREAMS[item.kind]
        if item.kind == "function_call":
            yield _event(f"{stream}.done", item, arguments=item.text, name=shown["name"])
        else:
            yield _event(f"{stream}.done", item, content_index=0, text=item.text, **_logprobs(item))
            yield _event("response.content_part.done", item, content_index=0, part=item.part(item.text))
        yield {"type": "response.output_item.done", "output_index": item.index, "item": shown}

    def _begin(self, kind: Kind, call: ToolCallDelta | None = None) -> Iterator[Event]:
        item = Item(kind, len(self.done), f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", call)
        self._open = item
        shown = item.as_json("in_progress")
        yield {"type": "response.output_item.added", "output_index": item.index, "item": shown}
        if call is None:
            yield _event("response.content_part.added", item, content_index=0, part=item.part(""))

    def _write(self, kind: Kind, text: str) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self.close("completed")
            yield from self._begin(kind)
        item = self._open
        assert item is not None
        if text:
            item.pieces.append(text)
            place = {} if kind == "function_call" else {"content_index": 0}
            yield _event(f"{_STREAMS[kind]}.delta", item, delta=text, **place, **_logprobs(item))


def _event(event_type: str, item: Item, **fields: Any) -> Event:
    return {"type": event_type, "item_id": item.id, "output_index": item.index, **fields}


def _logprobs(item: Item) -> dict[str, Any]:
    # Clients expect the field in events of the message's text, and only there.
    return {"logprobs": []} if item.kind == "message" else {}
