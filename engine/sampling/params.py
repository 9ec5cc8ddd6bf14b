"""The sampling parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.grammar.lark import Grammar
from quant.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one sequence, checked on creation.

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 are off. `logprobs` is None for none, else
    how many alternatives to report with the chosen token (0 to 20); `prompt_logprobs` the same for the
    prompt's own tokens. `grammar` constrains the answer. `seed` None picks a random one. `max_tokens` None
    means as many as the context holds. `min_tokens` come before any token or string that ends the answer.
    With `skip_special`, special tokens produce no text.
    Raises RequestError naming the field.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    skip_special: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._within("temperature", 0.0, 10.0)
        self._within("top_p", 0.0, 1.0)
        self._within("min_p", 0.0, 1.0)
        self._within("frequency_penalty", -2.0, 2.0)
        self._within("presence_penalty", -2.0, 2.0)
        self._within("repetition_penalty", 0.01, 10.0)
        if self.top_p == 0.0:
            raise RequestError("top_p must be greater than 0", param="top_p")
        if self.top_k < 0:
            raise RequestError("top_k must be 0 (off) or greater", param="top_k")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        if self.min_tokens < 0:
            raise RequestError("min_tokens must be 0 (off) or greater", param="min_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            text = f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens})"
            raise RequestError(text, param="min_tokens")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError("top_logprobs must be between 0 and 20", param="top_logprobs")
        if self.grammar is not None and self.ignore_eos:
            text = "a constrained answer ends with its grammar; leave out ignore_eos"
            raise RequestError(text, param="ignore_eos")
        if self.grammar is not None and self.min_tokens:
            text = "a constrained answer ends with its grammar; leave out min_tokens"
            raise RequestError(text, param="min_tokens")
        if any(not s for s in self.stop):
            raise RequestError("a stop string must not be empty", param="stop")
        for value in self.logit_bias.values():
            if not -100.0 <= value <= 100.0:
                raise RequestError("logit_bias values must be between -100 and 100", param="logit_bias")

    def _within(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise RequestError(f"{name} must be between {low:g} and {high:g}, got {value}", param=name)
