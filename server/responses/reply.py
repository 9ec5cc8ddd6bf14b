"""/v1/responses: the answer as a list of items, whole or as a stream of typed events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from engine.chat.format import ChatPrompt
from engine.chat.output_parser import MessageDelta
from engine.output import FinishReason, TokenLogprob
from server.http.errors import ApiError
from server.openai.logprobs import chat_logprobs
from server.openai.messages import Message
from server.openai.requests import ChatRequest
from server.responses.items import OutputItems
from server.responses.requests import ResponsesRequest
from server.serving.answer import Answer
from server.serving.generation import Generation
from server.serving.progress import Progress
from server.serving.reply import ConversationReply, Counts
from server.serving.segments import Event
from server.serving.service import Served
from server.serving.streaming import CLIENT_CLOSED_REQUEST


class ResponsesReply(ConversationReply):
    """Answers in the shape of the Responses interface. `keep` is handed what was finished."""

    last = b""

    def __init__(
        self,
        body: ResponsesRequest,
        chat: ChatRequest,
        prompt: ChatPrompt,
        served: Served,
        keep: Callable[[dict[str, Any], Message], None],
    ) -> None:
        super().__init__(chat, prompt, served)
        self._body = body
        self._keep = keep
        self.id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._items = OutputItems(body.origins, summarizes=body.wants_summary)
        self._events_sent = 0
        self._unclaimed: list[TokenLogprob] = []
        self.progress = Progress() if body.return_progress else None

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished response."""
        last: Event = {}
        async for event in self.events(generation):
            last = event
        response: dict[str, Any] = last["response"]
        return response

    async def events(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The events that build the response; the last one holds all of it."""
        yield self._event({"type": "response.created", "response": self._response("in_progress")})
        yield self._event({"type": "response.in_progress", "response": self._response("in_progress")})
        reason = None
        async for answer, deltas in self.pieces(generation):
            for told in self.progress_left(generation):
                yield told
            reason = answer.finish_reason
            if self._body.wants_logprobs:
                self._collect_logprobs(answer, deltas)
            for delta in deltas:
                for event in self._items.add(delta):
                    yield self._event(event)
        cut_off = reason is FinishReason.LENGTH
        for event in self._items.close(cut_off):
            yield self._event(event)
        status = "incomplete" if cut_off else "completed"
        response = self._response(status)
        self._keep(response, Message.model_validate(self.answers[0].message))
        yield self._event({"type": f"response.{status}", "response": response})

    def _collect_logprobs(self, answer: Answer, deltas: list[MessageDelta]) -> None:
        """Keep the log probabilities of the message's text; those of reasoning and calls are not told."""
        self._unclaimed += answer.new_logprobs()
        ids = [token.token_id for token in self._unclaimed]
        if answer.end_of_reasoning in ids:
            del self._unclaimed[: ids.index(answer.end_of_reasoning) + 1]
        if self._unclaimed and self._unclaimed[-1].token_id == answer.stop_match:
            del self._unclaimed[-1]
        if any(delta.content for delta in deltas):
            self._items.logprobs += chat_logprobs(self._served.loaded.tokenizer, self._unclaimed)
        if deltas:  # tokens whose text is still held back belong to the next piece
            self._unclaimed = []

    def waiting(self) -> dict[str, Any]:
        """`response.in_progress` once more."""
        return self._event({"type": "response.in_progress", "response": self._response("in_progress")})

    def cancelled(self) -> dict[str, Any]:
        """The response as far as it came before a client ended it."""
        return self._response("cancelled")

    def failure(self, error: ApiError) -> dict[str, Any]:
        """`response.failed`, with what there was of the answer."""
        response = self._response("cancelled" if error.status == CLIENT_CLOSED_REQUEST else "failed")
        response["error"] = {"code": "server_error", "message": error.message}
        return self._event({"type": "response.failed", "response": response})

    def _event(self, event: Event) -> Event:
        numbered = event | {"sequence_number": self._events_sent}
        self._events_sent += 1
        return numbered

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        given = body.model_dump(by_alias=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._served.name,
            "output": list(self._items.done),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": given["reasoning"] or {"effort": None},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": (given["text"] or {}).get("format") or {"type": "text"}},
            "tool_choice": given["tool_choice"] or "auto",
            "tools": given["tools"] or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None if status == "in_progress" else _usage(self.counts),
        }


def _usage(counts: Counts) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.generated,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.generated,
    }
