"""/v1/chat/completions: a conversation in, one or more assistant messages out, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from engine.generation import FinishReason, Output, TokenLogprob
from engine.output_parser import MessageDelta, OutputParser
from engine.prompts import ChatPrompt
from engine.sampling_params import SamplingParams
from server.generation import Generation
from server.logprobs import chat_logprobs
from server.openai_types import ChatRequest
from server.service import Served


class ChatReply:
    """Builds the answer to one request from what its sequences generate."""

    def __init__(self, request: ChatRequest, prompt: ChatPrompt, served: Served) -> None:
        self._request = request
        self._prompt = prompt
        self._served = served
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        parallel_calls = request.parallel_tool_calls is not False
        self._choices = [_Choice(i, prompt.new_parser(), parallel_calls) for i in range(request.choices)]

    @property
    def sequences(self) -> int:
        """How many sequences the answer takes."""
        return len(self._choices)

    def submit_to(self, generation: Generation) -> None:
        """Submit one sequence per choice. Raises what Generation.submit raises."""
        for choice in self._choices:
            generation.submit(self._prompt.token_ids, self._sampling(choice.index))

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished answer."""
        async for index, output in generation.outputs():
            self._choices[index].take(output)
        return self._envelope("chat.completion") | {
            "choices": [self._whole_choice(choice) for choice in self._choices],
            "usage": self._usage(),
        }

    async def events(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The answer as chunks."""
        async for index, output in generation.outputs():
            choice = self._choices[index]
            if not choice.has_begun:
                yield self._chunk(choice, {"role": "assistant", "content": ""})
            for delta in choice.take(output):
                yield self._chunk(choice, _delta_fields(delta))
            if choice.finish_reason is not None:
                yield self._chunk(choice, {})
        if self._request.wants_usage:
            yield self._envelope("chat.completion.chunk") | {"choices": [], "usage": self._usage()}

    def _sampling(self, choice: int) -> SamplingParams:
        max_tokens = self._request.answer_tokens
        if max_tokens is None:
            prompt = self._prompt
            max_tokens = self._served.default_max_tokens(prompt.max_tokens, len(prompt.token_ids))
        return self._request.sampling(
            self._served.vocab_size,
            choice,
            self._served.loaded.sampling,
            self._prompt.stop_token_ids,
            max_tokens=max_tokens,
            logprobs=(self._request.top_logprobs or 0) if self._request.logprobs else None,
        )

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._served.name}

    def _chunk(self, choice: _Choice, delta: dict[str, Any]) -> dict[str, Any]:
        # The last chunk of a choice has an empty delta, and only it has a reason.
        fields = {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._logprobs(choice.new_logprobs()),
            "finish_reason": None if delta else choice.finish_reason,
        }
        usage = {"usage": None} if self._request.wants_usage else {}
        return self._envelope("chat.completion.chunk") | {"choices": [fields]} | usage

    def _whole_choice(self, choice: _Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": choice.message(),
            "logprobs": self._logprobs(choice.new_logprobs()),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return {"content": chat_logprobs(self._served.loaded.tokenizer, tokens)}

    def _usage(self) -> dict[str, int]:
        return usage(len(self._prompt.token_ids), sum(choice.tokens for choice in self._choices))


class _Choice:
    """One answer as it grows."""

    def __init__(self, index: int, parser: OutputParser, parallel_calls: bool) -> None:
        self.index = index
        self.tokens = 0
        self.has_begun = False
        self.finish_reason: str | None = None
        self._parser = parser
        self._parallel_calls = parallel_calls
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[TokenLogprob] = []

    def take(self, output: Output) -> list[MessageDelta]:
        """What `output` adds to the message."""
        self.has_begun = True
        self.tokens += len(output.token_ids)
        self._logprobs += output.logprobs
        deltas = list(self._parser.push(output.text))
        if output.finish_reason is not None:
            deltas += self._parser.finish()
        kept = [delta for delta in map(self._within_limits, deltas) if delta != MessageDelta()]
        for delta in kept:
            self._add(delta)
        if output.finish_reason is not None:
            called = bool(self._calls) and output.finish_reason is FinishReason.STOP
            self.finish_reason = "tool_calls" if called else output.finish_reason.value
        return kept

    def new_logprobs(self) -> list[TokenLogprob]:
        """Logprobs since this was last asked."""
        fresh, self._logprobs = self._logprobs, []
        return fresh

    def message(self) -> dict[str, Any]:
        """The whole message."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = list(self._calls.values())
        return message

    def _within_limits(self, delta: MessageDelta) -> MessageDelta:
        if self._parallel_calls:
            return delta
        first_call = tuple(call for call in delta.tool_calls if call.index == 0)
        return MessageDelta(delta.content, delta.reasoning, first_call)

    def _add(self, delta: MessageDelta) -> None:
        self._content.append(delta.content)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            whole = self._calls.setdefault(
                call.index,
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}},
            )
            whole["function"]["arguments"] += call.arguments


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


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
