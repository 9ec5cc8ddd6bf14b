"""The output of a Responses answer as it grows: items, and the events that tell how each came about."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Literal

from server.serving.segments import AnswerSegment, Event, Kind, SegmentWriter

Status = Literal["in_progress", "completed", "incomplete"]

_PREFIXES: dict[Kind, str] = {"reasoning": "rs", "text": "msg", "call": "fc"}
_STREAMS: dict[Kind, str] = {
    "reasoning": "response.reasoning_text",
    "text": "response.output_text",
    "call": "response.function_call_arguments",
}


class OutputItems(SegmentWriter):
    """A segment is an item; `done` holds those that are finished.

    Log probabilities put into `logprobs` are told with the next piece of text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self._told: list[dict[str, Any]] = []  # log probabilities of the text being written
        self._id = ""

    def begun(self, segment: AnswerSegment) -> Iterator[Event]:
        self._id = f"{_PREFIXES[segment.kind]}_{uuid.uuid4().hex}"
        self._told = []
        item = self._item(segment, "in_progress")
        yield {"type": "response.output_item.added", "output_index": segment.index, "item": item}
        if segment.kind != "call":
            yield self._event(
                "response.content_part.added", segment, content_index=0, part=self._part(segment)
            )

    def grown(self, segment: AnswerSegment, text: str) -> Iterator[Event]:
        fields: dict[str, Any] = {} if segment.kind == "call" else {"content_index": 0}
        if segment.kind == "text":  # clients expect the field in events of the message's text, and only there
            fields["logprobs"], self.logprobs = self.logprobs, []
            self._told += fields["logprobs"]
        yield self._event(f"{_STREAMS[segment.kind]}.delta", segment, delta=text, **fields)

    def ended(self, segment: AnswerSegment, cut_off: bool) -> Iterator[Event]:
        item = self._item(segment, "incomplete" if cut_off else "completed")
        self.done.append(item)
        done = f"{_STREAMS[segment.kind]}.done"
        if segment.kind == "call":
            yield self._event(done, segment, arguments=segment.text, name=item["name"])
        else:
            told = {"logprobs": self._told} if segment.kind == "text" else {}
            yield self._event(done, segment, content_index=0, text=segment.text, **told)
            part = self._part(segment)
            yield self._event("response.content_part.done", segment, content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": segment.index, "item": item}

    def _item(self, segment: AnswerSegment, status: Status) -> dict[str, Any]:
        """The segment as clients see it."""
        common = {"id": self._id, "status": status}
        if segment.call is not None:
            call = {"call_id": segment.call.id, "name": segment.call.name, "arguments": segment.text}
            return common | {"type": "function_call"} | call
        content = [self._part(segment)] if segment.pieces else []
        if segment.kind == "reasoning":
            return common | {"type": "reasoning", "summary": [], "content": content}
        return common | {"type": "message", "role": "assistant", "content": content}

    def _event(self, event_type: str, segment: AnswerSegment, **fields: Any) -> Event:
        return {"type": event_type, "item_id": self._id, "output_index": segment.index, **fields}

    def _part(self, segment: AnswerSegment) -> dict[str, Any]:
        """The text so far as the content part that such an item has."""
        if segment.kind == "reasoning":
            return {"type": "reasoning_text", "text": segment.text}
        return {"type": "output_text", "text": segment.text, "annotations": [], "logprobs": list(self._told)}
