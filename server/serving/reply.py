"""Answers a request in any protocol: submits sequences, then reports what they generate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from engine.chat.format import ChatPrompt
from engine.chat.output_parser import MessageDelta
from engine.grammar.lark import Grammar
from engine.sampling.params import SamplingParams
from server.http.errors import ApiError
from server.openai.requests import UNLIMITED, ChatRequest
from server.serving.answer import Answer
from server.serving.generation import Generation
from server.serving.progress import Progress
from server.serving.service import Served
from server.serving.streaming import DONE, EVENTS


@dataclass(frozen=True)
class Counts:
    """Tokens of a request: of the prompt (`cached` ones were not computed again), and generated (of which
    some are reasoning). `predicted`: of what the client expected, where it said so, how many tokens were
    drafted and right, and how many wrong."""

    prompt: int
    generated: int
    reasoning: int = 0
    cached: int = 0
    predicted: tuple[int, int] | None = None


class Reply(ABC):
    """The answer to one request. `last` is what a stream ends with after all events; `progress` tells how far
    prompts are, where the client asked for that."""

    last = DONE
    framing = EVENTS
    id: str  # as clients read it
    progress: Progress | None = None

    @property
    @abstractmethod
    def grammar(self) -> Grammar | None:
        """The grammar that each sequence must match."""

    @property
    @abstractmethod
    def cache_salt(self) -> str | None:
        """What the client wants its cached prompts kept apart by."""

    @property
    @abstractmethod
    def sequences(self) -> int:
        """Number of sequences of the answer."""

    @property
    @abstractmethod
    def counts(self) -> Counts:
        """Tokens so far."""

    @abstractmethod
    def submit_to(self, generation: Generation) -> None:
        """Submit the sequences. Raises what Generation.submit raises."""

    @abstractmethod
    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished answer."""

    @abstractmethod
    def events(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The answer as events of a stream."""

    def pulse(self, generation: Generation, is_due: bool) -> dict[str, Any] | None:
        """An event for a stream that waits: where one `is_due` since the last, or the prompt has got on."""
        progress = None if self.progress is None else self.progress.of(generation)
        if progress is not None:
            return self._at(progress)
        return self.waiting() if is_due else None

    def progress_left(self, generation: Generation) -> Iterator[dict[str, Any]]:
        """Events that tell how far prompts are, before one that adds to the answer."""
        if self.progress is not None:
            yield from map(self._at, self.progress.rest(generation))

    def _at(self, progress: dict[str, Any]) -> dict[str, Any]:
        return self.waiting() | {"prompt_progress": progress}

    @abstractmethod
    def waiting(self) -> dict[str, Any]:
        """An event that says nothing but that the answer is still coming."""

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a failed stream."""
        return error.body


class ConversationReply(Reply):
    """One or more answers to a conversation. Protocols differ in how they represent them."""

    def __init__(self, request: ChatRequest, prompt: ChatPrompt, served: Served) -> None:
        self._request = request
        self._prompt = prompt
        self._served = served
        end = served.loaded.tokenizer.added_tokens.get(prompt.end_of_reasoning)
        parallel = request.parallel_tool_calls is not False
        self.answers = [Answer(i, prompt.new_parser(), parallel, end) for i in range(request.choices)]

    @property
    def grammar(self) -> Grammar | None:
        return self._prompt.grammar

    @property
    def cache_salt(self) -> str | None:
        return self._request.cache_salt

    @property
    def sequences(self) -> int:
        return len(self.answers)

    @property
    def counts(self) -> Counts:
        return Counts(
            prompt=len(self._prompt.token_ids),
            generated=sum(answer.tokens for answer in self.answers),
            reasoning=sum(answer.reasoning_tokens for answer in self.answers),
            cached=min(answer.cached_tokens for answer in self.answers),
            predicted=self._predicted,
        )

    @property
    def _predicted(self) -> tuple[int, int] | None:
        if not self._request.predicted_text:
            return None
        right, wrong = zip(*(answer.predicted for answer in self.answers), strict=True)
        return sum(right), sum(wrong)

    def submit_to(self, generation: Generation) -> None:
        text = self._request.predicted_text
        prediction = self._served.loaded.tokenizer.encode_inside(text) if text else ()
        for answer in self.answers:
            generation.submit(self._prompt.token_ids, self._sampling(answer.index), prediction)

    async def pieces(self, generation: Generation) -> AsyncIterator[tuple[Answer, list[MessageDelta]]]:
        """Each answer that grew, with what was added to it."""
        async for index, output in generation.outputs():
            answer = self.answers[index]
            yield answer, answer.take(output)

    async def finish(self, generation: Generation) -> None:
        """Return once all answers are complete."""
        async for _ in self.pieces(generation):
            pass

    def _sampling(self, choice: int) -> SamplingParams:
        max_tokens, prompt_tokens = self._request.answer_tokens, len(self._prompt.token_ids)
        if max_tokens is None:
            max_tokens = self._served.default_max_tokens(self._prompt.max_tokens, prompt_tokens)
        elif max_tokens != UNLIMITED:
            max_tokens = self._served.answer_limit(max_tokens, prompt_tokens)
        return self._request.sampling(
            self._served.vocab_size,
            choice,
            self._served.loaded.sampling,
            self._prompt.stop_token_ids,
            max_tokens=None if max_tokens == UNLIMITED else max_tokens,
            grammar=self.grammar,
            prompt_logprobs=self._request.prompt_logprobs,
            logprobs=(self._request.top_logprobs or 0) if self._request.logprobs else None,
        )
