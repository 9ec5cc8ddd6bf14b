"""/v1/completions: one or more prompts as text or token ids in, their continuations out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from engine.grammar.answer import content_grammar
from engine.grammar.lark import Grammar
from engine.output import FinishReason, Output, TokenLogprob
from engine.sampling.params import SamplingParams
from server.openai.chat import usage
from server.openai.completion_requests import CompletionRequest, check_ids
from server.openai.logprobs import CompletionLogprobs, echoed_logprobs, empty_logprobs, prompt_logprobs
from server.openai.requests import UNLIMITED
from server.serving.generation import Generation
from server.serving.progress import Progress
from server.serving.reply import Counts, Reply
from server.serving.service import Served

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as text and as the model sees it; `added` tokens at its start are ours, not the client's."""

    text: str
    token_ids: list[int]
    added: int


def tokenize_prompts(request: CompletionRequest, served: Served, salt: str) -> list[TokenizedPrompt]:
    """The request's prompts as token ids; texts begin with the tokens that the model's tokenizer adds, unless
    `add_special_tokens` is false. Their states are cached under `salt`."""
    tokenizer = served.loaded.tokenizer

    def front_of(ids: list[int]) -> list[int]:
        return [] if request.add_special_tokens is False else tokenizer.front_of(ids)

    def foresee(beginning: list[int]) -> None:
        served.engine.foresee(salt, front_of(beginning) + beginning)

    result = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt, on_beginning=foresee)
            front = front_of(ids)
            result.append(TokenizedPrompt(prompt, front + ids, len(front)))
        else:
            check_ids(prompt, served.vocab_size, "prompt")
            text = tokenizer.decode(prompt) if request.echo else ""
            result.append(TokenizedPrompt(text, prompt, 0))
    return result


class CompletionReply(Reply):
    """Builds the answer to one request; choice `p * n + i` is the i-th answer to prompt p.

    With `max_tokens: 0` prompts are only scored: one token is generated, because that is what makes
    the engine compute the prompt, and not shown.
    """

    def __init__(self, request: CompletionRequest, prompts: list[TokenizedPrompt], served: Served) -> None:
        self._request = request
        self._prompts = prompts
        self._served = served
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.progress = Progress() if request.return_progress else None
        self._scores_only = request.max_tokens == 0
        tokenizer = served.loaded.tokenizer
        self._grammar = content_grammar(request.as_format(), tokenizer.added_tokens)
        self._choices = [
            _Choice(p * request.choices + i, prompt, self._new_logprobs(prompt))
            for p, prompt in enumerate(prompts)
            for i in range(request.choices)
        ]

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that each sequence must match."""
        return self._grammar

    @property
    def cache_salt(self) -> str | None:
        """What the client wants its cached prompts kept apart by."""
        return self._request.cache_salt

    @property
    def sequences(self) -> int:
        """Number of sequences of the answer."""
        return len(self._choices)

    @property
    def counts(self) -> Counts:
        """Tokens of all prompts and all answers so far."""
        cached = [choice.cached_tokens for choice in self._choices]
        n = self._request.choices  # answers to one prompt, which is counted once
        return Counts(
            prompt=sum(len(prompt.token_ids) for prompt in self._prompts),
            generated=sum(choice.tokens for choice in self._choices),
            cached=sum(min(cached[i : i + n]) for i in range(0, len(cached), n)),
        )

    def submit_to(self, generation: Generation) -> None:
        """Submit one sequence per choice. Raises what Generation.submit raises."""
        for choice in self._choices:
            generation.submit(choice.prompt.token_ids, self._sampling(choice.index))

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished answer."""
        texts: dict[int, list[str]] = {choice.index: [] for choice in self._choices}
        logprobs = {choice.index: empty_logprobs() for choice in self._choices}
        async for index, output in generation.outputs():
            piece = self._take(self._choices[index], output)
            texts[index].append(piece["text"])
            for name, values in (piece["logprobs"] or {}).items():
                logprobs[index][name] += values
        choices = [
            {
                "index": choice.index,
                "text": "".join(texts[choice.index]),
                "logprobs": None if self._request.logprobs is None else logprobs[choice.index],
                "finish_reason": choice.finish_reason,
            }
            | self._of_the_prompt(choice)
            for choice in self._choices
        ]
        return self._envelope(choices) | {"usage": usage(self.counts)}

    async def events(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The answer as chunks."""
        async for index, output in generation.outputs():
            for told in self.progress_left(generation):
                yield told
            piece = self._take(self._choices[index], output)
            if piece["text"] or piece["logprobs"] or piece["finish_reason"]:
                yield self._envelope([piece]) | self._usage_so_far()
        if self._request.wants_usage:
            yield self._envelope([]) | {"usage": usage(self.counts)}

    def waiting(self) -> dict[str, Any]:
        """A chunk in which nothing was added."""
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
        return self._envelope([choice]) | self._usage_so_far()

    def _usage_so_far(self) -> dict[str, Any]:
        if self._request.counts_always:
            return {"usage": usage(self.counts)}
        return {"usage": None} if self._request.wants_usage else {}

    def _of_the_prompt(self, choice: _Choice) -> dict[str, Any]:
        if self._request.prompt_logprobs is None:
            return {}
        told = prompt_logprobs(self._served.loaded.tokenizer, choice.prompt_logprobs)
        return {"prompt_logprobs": told}

    def _sampling(self, index: int) -> SamplingParams:
        request = self._request
        max_tokens = 1 if self._scores_only else request.max_tokens
        prompt_tokens = len(self._choices[index].prompt.token_ids)
        if max_tokens is None:
            max_tokens = self._served.default_max_tokens(DEFAULT_MAX_TOKENS, prompt_tokens)
        elif max_tokens != UNLIMITED:
            max_tokens = self._served.answer_limit(max_tokens, prompt_tokens)
        echoed = request.logprobs if request.echo else None
        of_prompt = [wanted for wanted in (echoed, request.prompt_logprobs) if wanted is not None]
        return request.sampling(
            self._served.vocab_size,
            index % request.choices,
            self._served.loaded.sampling,
            max_tokens=None if max_tokens == UNLIMITED else max_tokens,
            grammar=self._grammar,
            skip_special=request.skip_special_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=max(of_prompt) if of_prompt else None,
        )

    def _new_logprobs(self, prompt: TokenizedPrompt) -> CompletionLogprobs:
        """Those of an answer to `prompt`."""
        return CompletionLogprobs(
            self._served.loaded.tokenizer,
            start=len(prompt.text) if self._request.echo else 0,
            skip_special=bool(self._request.skip_special_tokens),
            as_ids=bool(self._request.return_tokens_as_token_ids),
        )

    def _take(self, choice: _Choice, output: Output) -> dict[str, Any]:
        tokens: list[tuple[int, TokenLogprob | None]] = []
        text, lists = "", empty_logprobs()
        if self._request.echo and not choice.has_begun:
            text = choice.prompt.text
            told = zip(choice.prompt.token_ids, output.prompt_logprobs or (), strict=False)
            shown = list(told)[choice.prompt.added :]
            # As in OpenAI's API: what the first token followed, if anything, is not part of the text.
            first = [(shown[0][0], None)] if shown else []
            as_ids = bool(self._request.return_tokens_as_token_ids)
            tokenizer = self._served.loaded.tokenizer
            lists = echoed_logprobs(tokenizer, text, first + shown[1:], as_ids=as_ids)
        choice.has_begun = True
        choice.prompt_logprobs = choice.prompt_logprobs or output.prompt_logprobs or ()
        choice.cached_tokens += output.cached_tokens or 0
        if not self._scores_only:
            text += output.text
            tokens += [(token.token_id, token) for token in output.logprobs]
            choice.tokens += len(output.token_ids)
        if output.finish_reason is not None:
            reason = FinishReason.LENGTH if self._scores_only else output.finish_reason
            choice.finish_reason = reason.value
        for name, values in choice.logprobs.render(tokens).items():
            lists[name] += values
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None if self._request.logprobs is None else lists,
            "finish_reason": choice.finish_reason,
        }

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._served.name,
            "choices": choices,
        }


@dataclass
class _Choice:
    index: int
    prompt: TokenizedPrompt
    logprobs: CompletionLogprobs
    tokens: int = 0
    cached_tokens: int = 0
    has_begun: bool = False
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: str | None = None
