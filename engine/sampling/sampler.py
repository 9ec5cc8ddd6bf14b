"""From logits to a token: penalties, bias, truncation, a reproducible draw, and log probabilities.

Order of operations: logit_bias, repetition penalty, frequency and presence penalties, min_tokens, the
grammar's mask, temperature, top_k, top_p, min_p, draw. Log probabilities are those of the
model's own distribution, before any of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

import torch

from engine.grammar.constraint import Constraint
from engine.output import TokenLogprob
from engine.sampling.draw import draw_tokens
from engine.sampling.params import SamplingParams
from quant.kernels.cpu.draws import NativeDraws, native_draws

SEED_MASK = (1 << 63) - 1


class Sampler:
    """Draws the tokens of one sequence; its state is a random generator and token counts.

    No token of `ending` is drawn before `min_tokens` others.
    The same seed, parameters and logits give the same tokens, whatever else runs.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        vocab_size: int,
        constraint: Constraint | None = None,
        ending: Collection[int] = (),
    ) -> None:
        self.params = params
        self._constraint = constraint
        self._random = Random(None if params.seed is None else params.seed & SEED_MASK)
        self._bias = _bias_vector(params, vocab_size)
        counts_output = params.frequency_penalty != 0 or params.presence_penalty != 0
        self._counts = torch.zeros(vocab_size) if counts_output else None  # tokens of the answer
        self._seen: torch.Tensor | None = None  # tokens of prompt and answer
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt_ids, dtype=torch.int64)] = True
        self._early = params.min_tokens if ending else 0  # tokens left until one of `ending` is allowed
        self._ending = torch.tensor(sorted(ending), dtype=torch.int64)
        adjustments = (self._bias, self._counts, self._seen, constraint)
        self._adjusts = any(adjustment is not None for adjustment in adjustments)

    def sample(self, logits: torch.Tensor) -> int:
        """Choose the next token from logits `[vocab_size]` float32 and remember it.

        Raises RequestError if the answer's grammar allows no token.
        """
        rows = logits.unsqueeze(0)
        changed = self.adjusted(rows, 0)
        rows = rows if changed is None else changed.unsqueeze(0)
        (token,) = draw_tokens(rows, [self.params], [self.number()])
        self.remember(token)
        return token

    def number(self) -> float:
        """The next random number of the sequence, at least 0 and below 1."""
        return self._random.random()

    def remember(self, token: int) -> None:
        """Record a chosen token."""
        self._early = max(0, self._early - 1)
        if self._constraint is not None:
            self._constraint.advance(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def adjusted(self, logits: torch.Tensor, row: int) -> torch.Tensor | None:
        """A row of logits `[rows, vocab_size]` with bias, penalties and mask applied; None if there are none.

        Raises RequestError if the answer's grammar allows no token.
        """
        if not (self._adjusts or self._early):
            return None
        params, logits = self.params, logits[row]
        if self._bias is not None:
            logits = logits + self._bias
        if self._seen is not None:
            penalty = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._counts is not None:
            logits = logits - params.frequency_penalty * self._counts
            logits = logits - params.presence_penalty * (self._counts > 0)
        if self._early:
            logits = logits.index_fill(0, self._ending, -torch.inf)
        return logits if self._constraint is None else self._constraint.mask(logits)


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log probabilities of tokens `[n]` under `logits` `[n, vocab]`, with the `top` best of each row."""
    native = native_draws()
    if native is not None and logits.dtype == torch.float32 and logits.is_contiguous():
        return [_logprob(native, row, token, top) for row, token in zip(logits, tokens, strict=True)]
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    found = zip(logprobs, tokens, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, float(row[token]), tuple(zip(ids, values, strict=True)))
        for row, token, ids, values in found
    ]


def _logprob(native: NativeDraws, logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """The same for one token under logits `[vocab]`."""
    total, best = native.best(logits, min(top, len(logits)))
    chosen, *values = logits[[token, *best]].tolist()
    pairs = zip(best, (value - total for value in values), strict=True)
    return TokenLogprob(token, chosen - total, tuple(pairs))


def _bias_vector(params: SamplingParams, vocab_size: int) -> torch.Tensor | None:
    if not params.logit_bias:
        return None
    bias = torch.zeros(vocab_size)
    for token_id, value in params.logit_bias.items():
        bias[token_id] = value
    return bias
