"""The output of a Responses answer as it grows: items, and the events that tell how each came about."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Literal

from server.openai.tools import Origins, custom_input, origin_of
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

    origins     what the client calls the functions that the model calls
    summarizes  reasoning comes as its summary, which clients show, not as content
    """

    def __init__(self, origins: Origins | None = None, *, summarizes: bool = False) -> None:
        super().__init__()
        self._origins = origins or {}
        self._summarizes = summarizes
        self.done: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self._told: list[dict[str, Any]] = []  # log probabilities of the text being written
        self._id = ""

    def begun(self, segment: AnswerSegment) -> Iterator[Event]:
        is_custom = self._is_custom(segment)
        self._id = f"{'ctc' if is_custom else _PREFIXES[segment.kind]}_{uuid.uuid4().hex}"
        self._told = []
        item = self._item(segment, "in_progress")
        yield {"type": "response.output_item.added", "output_index": segment.index, "item": item}
        if segment.kind != "call":
            yield self._event(f"{self._part_events(segment)}.added", segment, part=self._part(segment))

    def grown(self, segment: AnswerSegment, text: str) -> Iterator[Event]:
        if self._is_custom(segment):
            return  # its text is inside a string of JSON
        fields: dict[str, Any] = {}
        if segment.kind == "text":  # clients expect the field in events of the message's text, and only there
            fields["logprobs"], self.logprobs = self.logprobs, []
            self._told += fields["logprobs"]
        yield self._event(f"{self._stream(segment)}.delta", segment, delta=text, **fields)

    def ended(self, segment: AnswerSegment, cut_off: bool) -> Iterator[Event]:
        item = self._item(segment, "incomplete" if cut_off else "completed")
        self.done.append(item)
        done = f"{self._stream(segment)}.done"
        if self._is_custom(segment):
            yield self._event(f"{self._stream(segment)}.delta", segment, delta=item["input"])
            yield self._event(done, segment, input=item["input"])
        elif segment.kind == "call":
            yield self._event(done, segment, arguments=segment.text, name=item["name"])
        else:
            told = {"logprobs": self._told} if segment.kind == "text" else {}
            yield self._event(done, segment, text=segment.text, **told)
            yield self._event(f"{self._part_events(segment)}.done", segment, part=self._part(segment))
        yield {"type": "response.output_item.done", "output_index": segment.index, "item": item}

    def _item(self, segment: AnswerSegment, status: Status) -> dict[str, Any]:
        """The segment as clients see it."""
        common = {"id": self._id, "status": status}
        if segment.call is not None:
            origin = origin_of(segment.call.name or "", self._origins)
            call: dict[str, Any] = {"call_id": segment.call.id, "name": origin.name}
            if origin.namespace is not None:
                call["namespace"] = origin.namespace
            if origin.is_custom:
                done = custom_input(segment.text) if status != "in_progress" else ""
                return common | {"type": "custom_tool_call"} | call | {"input": done}
            return common | {"type": "function_call"} | call | {"arguments": segment.text}
        parts = [self._part(segment)] if segment.pieces else []
        if segment.kind == "reasoning":
            texts = {"summary": parts} if self._summarizes else {"summary": [], "content": parts}
            return common | {"type": "reasoning", **texts}
        return common | {"type": "message", "role": "assistant", "content": parts}

    def _event(self, event_type: str, segment: AnswerSegment, **fields: Any) -> Event:
        """An event about the item's only part, or its call."""
        index = {}
        if segment.kind != "call":
            index = {"summary_index" if self._is_summary(segment) else "content_index": 0}
        return {
            "type": event_type,
            "item_id": self._id,
            "output_index": segment.index,
            **index,
            **fields,
        }

    def _is_custom(self, segment: AnswerSegment) -> bool:
        return segment.call is not None and origin_of(segment.call.name or "", self._origins).is_custom

    def _is_summary(self, segment: AnswerSegment) -> bool:
        return segment.kind == "reasoning" and self._summarizes

    def _stream(self, segment: AnswerSegment) -> str:
        if self._is_custom(segment):
            return "response.custom_tool_call_input"
        return "response.reasoning_summary_text" if self._is_summary(segment) else _STREAMS[segment.kind]

    def _part_events(self, segment: AnswerSegment) -> str:
        return f"response.{'reasoning_summary_part' if self._is_summary(segment) else 'content_part'}"

    def _part(self, segment: AnswerSegment) -> dict[str, Any]:
        """The text so far as the part that such an item has."""
        if segment.kind == "reasoning":
            return {"type": "summary_text" if self._summarizes else "reasoning_text", "text": segment.text}
        return {"type": "output_text", "text": segment.text, "annotations": [], "logprobs": list(self._told)}
