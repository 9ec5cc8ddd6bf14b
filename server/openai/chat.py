"""/v1/chat/completions: a conversation in, one or more assistant messages out, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from engine.chat.format import ChatPrompt
from engine.chat.output_parser import MessageDelta
from engine.output import TokenLogprob
from server.openai.logprobs import chat_logprobs, prompt_logprobs
from server.openai.requests import ChatRequest
from server.openai.tools import custom_input
from server.serving.answer import Answer, Call
from server.serving.generation import Generation
from server.serving.progress import Progress
from server.serving.reply import ConversationReply, Counts
from server.serving.service import Served


class ChatReply(ConversationReply):
    """Answers in the shape of Chat Completions."""

    def __init__(self, request: ChatRequest, prompt: ChatPrompt, served: Served) -> None:
        super().__init__(request, prompt, served)
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.progress = Progress() if request.return_progress else None

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished answer."""
        await self.finish(generation)
        return (
            self._envelope("chat.completion")
            | {
                "choices": [self._whole_choice(answer) for answer in self.answers],
                "usage": usage(self.counts),
            }
            | self._of_the_prompt()
        )

    def _of_the_prompt(self) -> dict[str, Any]:
        if self._request.prompt_logprobs is None:
            return {}
        told = self.answers[0].prompt_logprobs
        return {"prompt_logprobs": prompt_logprobs(self._served.loaded.tokenizer, told)}

    async def events(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The answer as chunks."""
        begun: set[int] = set()
        async for answer, deltas in self.pieces(generation):
            for told in self.progress_left(generation):
                yield told
            if answer.index not in begun:
                begun.add(answer.index)
                yield self._chunk(answer, {"role": "assistant", "content": ""}, [])
            for delta in deltas:
                if fields := self._delta_fields(answer, delta):
                    yield self._chunk(answer, fields, answer.new_logprobs())
            if answer.finish_reason is not None:
                calls = [{"index": i, **call} for i, call in enumerate(self._calls(answer))]
                if custom := [call for call in calls if call["type"] == "custom"]:
                    yield self._chunk(answer, {"tool_calls": custom}, answer.new_logprobs())
                yield self._chunk(answer, {}, answer.new_logprobs())
        if self._request.wants_usage:
            yield self._envelope("chat.completion.chunk") | {"choices": [], "usage": usage(self.counts)}

    def waiting(self) -> dict[str, Any]:
        """A chunk in which nothing was added."""
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}
        return self._envelope("chat.completion.chunk") | {"choices": [choice]} | self._usage_so_far()

    def _usage_so_far(self) -> dict[str, Any]:
        if self._request.counts_always:
            return {"usage": usage(self.counts)}
        return {"usage": None} if self._request.wants_usage else {}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._served.name}

    def _chunk(self, answer: Answer, delta: dict[str, Any], logprobs: list[TokenLogprob]) -> dict[str, Any]:
        # The last chunk of a choice has an empty delta, and only it has a reason.
        fields = {
            "index": answer.index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": None if delta else _finish_reason(answer),
        }
        return self._envelope("chat.completion.chunk") | {"choices": [fields]} | self._usage_so_far()

    def _whole_choice(self, answer: Answer) -> dict[str, Any]:
        return {
            "index": answer.index,
            "message": answer.message | ({"tool_calls": self._calls(answer)} if answer.calls else {}),
            "logprobs": self._logprobs(answer.new_logprobs()),
            "finish_reason": _finish_reason(answer),
        }

    def _delta_fields(self, answer: Answer, delta: MessageDelta) -> dict[str, Any]:
        """The delta as clients see it; calls of tools that take text come at the end, whole."""
        custom = self._request.custom_tools
        if custom and delta.tool_calls:
            kept = tuple(call for call in delta.tool_calls if answer.calls[call.index].name not in custom)
            delta = MessageDelta(delta.content, delta.reasoning, kept)
        return _delta_fields(delta)

    def _calls(self, answer: Answer) -> list[dict[str, Any]]:
        """The answer's calls so far; those of tools that take text with it."""
        custom = self._request.custom_tools
        return [
            {"id": call.id, "type": "custom", "custom": _custom_call(call)}
            if call.name in custom
            else {"id": call.id, "type": "function", "function": call.function}
            for call in answer.calls
        ]

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        as_ids = bool(self._request.return_tokens_as_token_ids)
        return {
            "content": chat_logprobs(self._served.loaded.tokenizer, tokens, as_ids=as_ids),
            "refusal": None,
        }


def usage(counts: Counts) -> dict[str, Any]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.generated,
        "total_tokens": counts.prompt + counts.generated,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning, **_predicted(counts)},
    }


def _predicted(counts: Counts) -> dict[str, int]:
    if counts.predicted is None:
        return {}
    accepted, rejected = counts.predicted
    return {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}


def _custom_call(call: Call) -> dict[str, str]:
    return {"name": call.name, "input": custom_input(call.arguments)}


def _finish_reason(answer: Answer) -> str | None:
    return "tool_calls" if answer.called_tools else answer.finish_reason and answer.finish_reason.value


def _delta_fields(delta: MessageDelta) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.content:
        fields["content"] = delta.content
    if delta.tool_calls:
        fields["tool_calls"] = list(_call_fields(delta))
    return fields


def _call_fields(delta: MessageDelta) -> Iterator[dict[str, Any]]:
    for call in delta.tool_calls:
        if call.id is None:
            yield {"index": call.index, "function": {"arguments": call.arguments}}
        else:
            function = {"name": call.name, "arguments": call.arguments}
            yield {"index": call.index, "id": call.id, "type": "function", "function": function}
