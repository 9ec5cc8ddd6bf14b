"""From logits to a token: penalties, bias, truncation, a reproducible draw, and log probabilities.

Order of operations: logit_bias, repetition penalty, frequency and presence penalties, min_tokens, the
grammar's mask, temperature, top_k, top_p, min_p, draw. Log probabilities are those of the
model's own distribution, before any of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

import numpy as np
import torch

from engine.grammar.constraint import Constraint
from engine.output import TokenLogprob
from engine.sampling.counts import TokenCounts
from engine.sampling.draw import draw_tokens
from engine.sampling.params import SamplingParams
from quant.kernels.cpu.draws import native_draws

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
        constraint: Constraint | None = None,
        ending: Collection[int] = (),
    ) -> None:
        self.params = params
        self._constraint = constraint
        self._random = Random(None if params.seed is None else params.seed & SEED_MASK)
        self._biased = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        counts_output = params.frequency_penalty != 0 or params.presence_penalty != 0
        self._output = TokenCounts() if counts_output else None  # tokens of the answer
        self._seen = TokenCounts(prompt_ids) if params.repetition_penalty != 1 else None  # and of the prompt
        self._early = params.min_tokens if ending else 0  # tokens left until one of `ending` is allowed
        self._ending = np.array(sorted(ending), dtype=np.int64)
        self._adjusts = bool(params.logit_bias) or self._output is not None or self._seen is not None
        self._ahead: list[float] = []  # random numbers that were looked at and not used yet

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

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's own logits, whatever is drawn before them."""
        return not self._adjusts and not self._early and self._constraint is None

    def numbers(self, count: int) -> list[float]:
        """The sequence's next random numbers, at least 0 and below 1; `number` still gives them."""
        while len(self._ahead) < count:
            self._ahead.append(self._random.random())
        return self._ahead[:count]

    def number(self) -> float:
        """The next random number of the sequence."""
        return self._ahead.pop(0) if self._ahead else self._random.random()

    def remember(self, token: int) -> None:
        """Record a chosen token."""
        self._early = max(0, self._early - 1)
        if self._constraint is not None:
            self._constraint.advance(token)
        if self._output is not None:
            self._output.add(token)
        if self._seen is not None:
            self._seen.add(token)

    def adjusted(self, logits: torch.Tensor, row: int) -> torch.Tensor | None:
        """A row of logits `[rows, vocab_size]` with bias, penalties and mask applied; None if there are none.

        Raises RequestError if the answer's grammar allows no token.
        """
        if self._adjusts or self._early:
            changed = logits[row].clone()
            self._adjust(changed.numpy())
        elif self._constraint is not None:
            changed = logits[row]
        else:
            return None
        return changed if self._constraint is None else self._constraint.mask(changed)

    def _adjust(self, logits: np.ndarray) -> None:
        """Apply bias and penalties to logits `[vocab_size]`: few tokens have any."""
        params = self.params
        logits[self._biased] += self._bias
        if self._seen is not None:
            seen = logits[self._seen.ids]
            factor = np.float32(params.repetition_penalty)
            logits[self._seen.ids] = np.where(seen > 0, seen / factor, seen * factor)
        if self._output is not None:
            logits[self._output.ids] -= np.float32(params.frequency_penalty) * self._output.counts
            logits[self._output.ids] -= np.float32(params.presence_penalty)
        if self._early:
            logits[self._ending] = -np.inf


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log probabilities of tokens `[n]` under `logits` `[n, vocab]`, with the `top` best of each row."""
    native = native_draws()
    if native is not None and logits.dtype == torch.float32 and logits.is_contiguous():
        top = min(top, logits.shape[1])
        own = (native.best(logits, row, token, top) for row, token in enumerate(tokens))
        pairs = zip(tokens, own, strict=True)
        return [TokenLogprob(token, chosen, tuple(best)) for token, (chosen, best) in pairs]
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    found = zip(logprobs, tokens, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, float(row[token]), tuple(zip(ids, values, strict=True)))
        for row, token, ids, values in found
    ]
