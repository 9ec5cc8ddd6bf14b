"""/v1/messages: the answer as a list of content blocks, whole or as a stream of events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from engine.chat.format import ChatPrompt
from engine.output import FinishReason
from server.http.errors import ApiError
from server.openai.requests import ChatRequest
from server.serving.answer import Answer
from server.serving.call_input import ControlCharacters, call_input
from server.serving.generation import Generation
from server.serving.reply import ConversationReply
from server.serving.segments import AnswerSegment, Event, SegmentWriter
from server.serving.service import Served


class MessagesReply(ConversationReply):
    """Answers in the shape of Anthropic's Messages."""

    last = b""

    def __init__(
        self, chat: ChatRequest, prompt: ChatPrompt, served: Served, *, hides_thinking: bool = False
    ) -> None:
        super().__init__(chat, prompt, served)
        self.id = f"msg_{uuid.uuid4().hex}"
        self._blocks = ContentBlocks(hides_thinking=hides_thinking)

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished message."""
        async for _ in self.events(generation):
            pass
        return self._message() | self._ending(self.answers[0])

    async def events(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The events that build the message."""
        yield {"type": "message_start", "message": self._message()}
        yield {"type": "ping"}
        async for _, deltas in self.pieces(generation):
            for delta in deltas:
                for event in self._blocks.add(delta):
                    yield event
        for event in self._blocks.close():
            yield event
        yield {"type": "message_delta", "delta": self._ending(self.answers[0]), "usage": self._usage()}
        yield {"type": "message_stop"}

    def waiting(self) -> dict[str, Any]:
        return {"type": "ping"}

    def failure(self, error: ApiError) -> dict[str, Any]:
        return error.messages_body

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._served.name,
            "content": list(self._blocks.done),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _ending(self, answer: Answer) -> dict[str, Any]:
        stopped_by = answer.stop_match if isinstance(answer.stop_match, str) else None
        if answer.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif stopped_by is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if answer.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stopped_by}

    def _usage(self) -> dict[str, int]:
        counts = self.counts
        return {
            "input_tokens": counts.prompt - counts.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.cached,
            "output_tokens": counts.generated,
        }


class ContentBlocks(SegmentWriter):
    """A segment is a content block; `done` holds those that are finished.

    hides_thinking  blocks of reasoning are empty
    """

    def __init__(self, *, hides_thinking: bool = False) -> None:
        super().__init__()
        self._hides_thinking = hides_thinking
        self.done: list[dict[str, Any]] = []
        self._raw = ControlCharacters()

    def begun(self, segment: AnswerSegment) -> Iterator[Event]:
        self._raw = ControlCharacters()
        yield {"type": "content_block_start", "index": segment.index, "content_block": _block(segment, {})}

    def grown(self, segment: AnswerSegment, text: str) -> Iterator[Event]:
        if segment.kind == "reasoning" and self._hides_thinking:
            segment.pieces.clear()
            return
        kind, field = {
            "reasoning": ("thinking_delta", "thinking"),
            "text": ("text_delta", "text"),
            "call": ("input_json_delta", "partial_json"),
        }[segment.kind]
        yield _delta(segment, kind, field, self._raw.escaped(text) if segment.kind == "call" else text)

    def ended(self, segment: AnswerSegment, cut_off: bool) -> Iterator[Event]:
        self.done.append(_block(segment, call_input(segment.text) if segment.kind == "call" else {}))
        if segment.kind == "reasoning":
            yield _delta(segment, "signature_delta", "signature", "")
        yield {"type": "content_block_stop", "index": segment.index}


def _block(segment: AnswerSegment, arguments: dict[str, Any]) -> dict[str, Any]:
    if segment.call is not None:
        return {
            "type": "tool_use",
            "id": segment.call.id,
            "name": segment.call.name,
            "input": arguments,
        }
    if segment.kind == "reasoning":
        # Nothing is signed: what comes back is taken as it is.
        return {"type": "thinking", "thinking": segment.text, "signature": ""}
    return {"type": "text", "text": segment.text}


def _delta(segment: AnswerSegment, kind: str, field: str, text: str) -> Event:
    return {"type": "content_block_delta", "index": segment.index, "delta": {"type": kind, field: text}}
