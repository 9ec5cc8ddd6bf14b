"""/api/chat and /api/generate: the answer as lines of JSON, or as one object."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from engine.chat.format import ChatPrompt
from engine.chat.output_parser import MessageDelta
from engine.output import FinishReason
from server.http.errors import ApiError
from server.openai.logprobs import chat_logprobs
from server.openai.requests import ChatRequest
from server.serving.answer import Answer
from server.serving.call_input import call_input
from server.serving.generation import Generation
from server.serving.reply import ConversationReply
from server.serving.service import Served
from server.serving.streaming import LINES


class OllamaReply(ConversationReply):
    """Answers in the shape of Ollama's chats; `as_text` in that of its plain texts."""

    last = b""
    framing = LINES

    def __init__(
        self, chat: ChatRequest, prompt: ChatPrompt, served: Served, *, as_text: bool = False
    ) -> None:
        super().__init__(chat, prompt, served)
        self.id = f"ollama-{time.time_ns():x}"
        self._as_text = as_text
        self._began_ns = time.perf_counter_ns()
        self._first_ns: int | None = None

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished answer."""
        await self.finish(generation)
        (answer,) = self.answers
        line = self._line(answer.content, answer.reasoning, _calls(answer), self._logprobs(answer))
        return line | self._ending(answer)

    async def events(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The answer line by line; calls come whole, at its end."""
        (answer,) = self.answers
        async for _, deltas in self.pieces(generation):
            if self._first_ns is None:
                self._first_ns = time.perf_counter_ns()
            for delta in deltas:
                if delta != MessageDelta(tool_calls=delta.tool_calls):
                    yield self._line(delta.content, delta.reasoning, [], self._logprobs(answer))
        if answer.calls:
            yield self._line("", "", _calls(answer), None)
        yield self._line("", "", [], self._logprobs(answer)) | self._ending(answer)

    def waiting(self) -> dict[str, Any]:
        """A line with no text."""
        return self._line("", "", [], None)

    def failure(self, error: ApiError) -> dict[str, Any]:
        return error.ollama_body

    def _logprobs(self, answer: Answer) -> list[dict[str, Any]] | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(self._served.loaded.tokenizer, answer.new_logprobs())

    def _line(
        self, text: str, thinking: str, calls: list[dict[str, Any]], logprobs: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        line: dict[str, Any] = {"model": self._served.name, "created_at": now()}
        if self._as_text:
            line["response"] = text
            line |= {"thinking": thinking} if thinking else {}
        else:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            message |= {"thinking": thinking} if thinking else {}
            message |= {"tool_calls": calls} if calls else {}
            line["message"] = message
        return line | ({"logprobs": logprobs} if logprobs else {}) | {"done": False}

    def _ending(self, answer: Answer) -> dict[str, Any]:
        counts = self.counts
        end_ns = time.perf_counter_ns()
        first_ns = self._first_ns or end_ns
        return {
            "done": True,
            "done_reason": "length" if answer.finish_reason is FinishReason.LENGTH else "stop",
            "total_duration": end_ns - self._began_ns,
            "load_duration": 0,
            "prompt_eval_count": counts.prompt,
            "prompt_eval_duration": first_ns - self._began_ns,
            "eval_count": counts.generated,
            "eval_duration": end_ns - first_ns,
        }


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "function": {"index": i, "name": call.name, "arguments": call_input(call.arguments)}}
        for i, call in enumerate(answer.calls)
    ]


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
