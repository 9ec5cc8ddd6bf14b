"""One answer as it is generated: reasoning, content and tool calls, independent of the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.chat.output_parser import MessageDelta, OutputParser
from engine.output import FinishReason, Output, TokenLogprob


@dataclass
class Call:
    """A tool call, whose arguments arrive in pieces."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """The arguments so far, as JSON text."""
        return "".join(self.pieces)

    @property
    def function(self) -> dict[str, str]:
        """Name and arguments, as messages have them."""
        return {"name": self.name, "arguments": self.arguments}


class Answer:
    """Collects the outputs of one sequence into a message.

    index             which of a request's answers this is
    parallel_calls    False drops every tool call but the first
    end_of_reasoning  the token that closes the reasoning, where the model has one
    """

    def __init__(
        self, index: int, parser: OutputParser, parallel_calls: bool, end_of_reasoning: int | None
    ) -> None:
        self.index = index
        self.tokens = 0
        self.cached_tokens = 0
        self.predicted = (0, 0)  # see `Output`
        self.finish_reason: FinishReason | None = None
        self.stop_match: str | int | None = None
        self.calls: list[Call] = []
        self._parser = parser
        self._parallel_calls = parallel_calls
        self.end_of_reasoning = end_of_reasoning
        self._tokens_before_content = 0
        self._in_reasoning = True
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    @property
    def content(self) -> str:
        """The message's text so far."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(self._reasoning)

    @property
    def message(self) -> dict[str, Any]:
        """The message so far, in OpenAI's shape, in which conversations are stored."""
        content = self.content
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
        }
        if self._reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function} for call in self.calls
            ]
        return message

    @property
    def called_tools(self) -> bool:
        """True where the answer ended because the model waits for results of its calls."""
        return bool(self.calls) and self.finish_reason is FinishReason.STOP

    @property
    def reasoning_tokens(self) -> int:
        """Number of reasoning tokens; 0 without reasoning, or if no token marks its end."""
        return self._tokens_before_content if self._reasoning and self.end_of_reasoning is not None else 0

    def take(self, output: Output) -> list[MessageDelta]:
        """What `output` adds to the message."""
        self._count(output.token_ids)
        self.cached_tokens += output.cached_tokens or 0
        self.predicted = output.predicted
        self._logprobs += output.logprobs
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs or ()
        deltas = list(self._parser.push(output.text, output.special_ranges))
        if output.finish_reason is not None:
            deltas += self._parser.finish()
            self.finish_reason = output.finish_reason
            self.stop_match = output.stop_match
        kept = [delta for delta in map(self._within_limits, deltas) if delta != MessageDelta()]
        for delta in kept:
            self._add(delta)
        return kept

    def new_logprobs(self) -> list[TokenLogprob]:
        """Logprobs since the last call."""
        fresh, self._logprobs = self._logprobs, []
        return fresh

    def _count(self, token_ids: tuple[int, ...]) -> None:
        self.tokens += len(token_ids)
        for token_id in token_ids if self._in_reasoning else ():
            self._tokens_before_content += 1
            if token_id == self.end_of_reasoning:
                self._in_reasoning = False
                break

    def _within_limits(self, delta: MessageDelta) -> MessageDelta:
        if self._parallel_calls:
            return delta
        first_call = tuple(call for call in delta.tool_calls if call.index == 0)
        return MessageDelta(delta.content, delta.reasoning, first_call)

    def _add(self, delta: MessageDelta) -> None:
        if delta.content:
            self._content.append(delta.content)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        for piece in delta.tool_calls:
            if piece.index == len(self.calls):
                self.calls.append(Call(piece.id or "", piece.name or ""))
            self.calls[piece.index].pieces.append(piece.arguments)
