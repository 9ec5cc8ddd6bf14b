"""Keeps of drafted tokens what the model says itself.

Tokens are drawn row by row with the sequence's own sampler, as without drafts: behind its newest token, and
behind each draft for as long as what was drawn is what was drafted. Penalties, grammars, stop strings and the
random numbers are where they would be, so the answer is the same, greedy or drawn. For a drawn one, this is
what rejection sampling does with a drafter that is sure of itself: a draft is accepted with the probability
that the model gives it, and otherwise the token is drawn from the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import NamedTuple

import torch

from engine.output import TokenLogprob
from engine.sampling.draw import draw_tokens
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import token_logprobs
from engine.sequence import Sequence
from quant.errors import LociError

# Tokens before one that is expected: as many as n-grams reach back.
MOST_BEFORE = 16


class Ready(NamedTuple):
    """A sequence whose next tokens are to be drawn.

    row      of the logits behind its newest token; those behind its drafts follow
    drafted  tokens that were computed along with it
    is_predicted  these are of what the client expects
    """

    sequence: Sequence
    row: int
    drafted: tuple[int, ...] = ()
    is_predicted: bool = False


class Verifier:
    """Draws and reports tokens.

    expect  called as soon as the tokens are known which are not computed yet, each with those before it
    fail    takes sequences out that cannot go on
    """

    def __init__(
        self,
        expect: Callable[[Ids[tuple[Ids[int], int]]], None],
        fail: Callable[[list[Sequence], Exception], None],
    ) -> None:
        self.generated_tokens = 0
        self._expect = expect
        self._fail = fail

    def take(self, ready: Ids[Ready], logits: torch.Tensor) -> list[int]:
        """Draw the next tokens of each sequence from logits `[rows, vocab]`: one, and one more behind each
        draft that is accepted. Returns how many drafts were, of each."""
        accepted = [0] * len(ready)
        left = list(enumerate(ready))
        if any(r.drafted for r in ready):
            at_once = [(at, r) for at, r in left if r.drafted and r.sequence.sampler.is_plain]
            left = [(at, r) for at, r in left if not (r.drafted and r.sequence.sampler.is_plain)]
            self._take_at_once(at_once, logits, accepted)
        depth = 0
        while left:
            tokens = self._draw([r for _, r in left], depth, logits)
            known = [(at, r) for at, r in left if tokens.get(r.sequence) == _drafted(r, depth)]
            for at, _ in known:
                accepted[at] += 1
            left = [(at, r) for at, r in known if r.sequence.finish_reason is None]
            depth += 1
        return accepted

    def _take_at_once(
        self, ready: list[tuple[int, Ready]], logits: torch.Tensor, accepted: list[int]
    ) -> None:
        """The same for sequences whose tokens depend on nothing but logits and random numbers: all that may
        be needed are drawn together."""
        if not ready:
            return
        params: list[SamplingParams] = []
        numbers: list[float] = []
        rows: list[int] = []
        for _, r in ready:
            count = 1 + len(r.drafted)
            params += [r.sequence.params] * count
            numbers += r.sequence.sampler.numbers(count)
            rows += range(r.row, r.row + count)
        try:
            tokens = draw_tokens(logits if len(rows) == len(logits) else logits[rows], params, numbers)
            kept = []
            for _, r in ready:
                drawn, tokens = tokens[: 1 + len(r.drafted)], tokens[1 + len(r.drafted) :]
                same = 0
                while same < len(r.drafted) and drawn[same] == r.drafted[same]:
                    same += 1
                kept.append(drawn[: same + 1])
            ahead = zip(ready, kept, strict=True)
            self._expect(
                [
                    ([*r.sequence.token_ids[-MOST_BEFORE:], *k[:-1]], k[-1])
                    for (_, r), k in ahead
                    if k[-1] >= 0
                ]
            )
        except Exception as error:
            self._fail([r.sequence for _, r in ready], error)
            return
        for (at, r), found in zip(ready, kept, strict=True):
            try:
                for depth, token in enumerate(found):
                    r.sequence.sampler.number()
                    if r.is_predicted:
                        _count(r, depth, token)
                    self._take(r.sequence, logits, r.row + depth, token)
                    accepted[at] += token == _drafted(r, depth)
                    if r.sequence.finish_reason is not None:
                        break
            except Exception as error:
                self._fail([r.sequence], error)

    def _draw(self, ready: list[Ready], depth: int, logits: torch.Tensor) -> dict[Sequence, int]:
        """Draw and report a token of each sequence, behind as many drafts; those of sequences that did not
        fail."""
        drawn: list[Ready] = []
        rows: list[torch.Tensor | None] = []  # None: the model's own logits
        for r in ready:
            try:
                rows.append(r.sequence.sampler.adjusted(logits, r.row + depth))
                drawn.append(r)
            except Exception as error:
                self._fail([r.sequence], error)
        if not drawn:
            return {}
        try:
            if len(drawn) == len(logits) and not any(row is not None for row in rows):
                of_all = logits
            elif len(drawn) == 1 and rows[0] is None:
                of_all = logits[drawn[0].row + depth].unsqueeze(0)
            else:
                pairs = zip(drawn, rows, strict=True)
                of_all = torch.stack([logits[r.row + depth] if row is None else row for r, row in pairs])
            tokens = draw_tokens(
                of_all,
                [r.sequence.params for r in drawn],
                [r.sequence.sampler.number() for r in drawn],
            )
            known = zip(drawn, tokens, strict=True)
            self._expect([(r.sequence.token_ids, t) for r, t in known if t >= 0 and t != _drafted(r, depth)])
        except Exception as error:
            self._fail([r.sequence for r in drawn], error)
            return {}
        found: dict[Sequence, int] = {}
        for r, token in zip(drawn, tokens, strict=True):
            try:
                if r.is_predicted:
                    _count(r, depth, token)
                self._take(r.sequence, logits, r.row + depth, token)
                found[r.sequence] = token
            except Exception as error:
                self._fail([r.sequence], error)
        return found

    def _take(self, sequence: Sequence, logits: torch.Tensor, row: int, token: int) -> None:
        """Report a token that was drawn from a row of logits `[rows, vocab]`."""
        top = sequence.params.logprobs
        if token < 0:
            raise LociError("the model produced NaN; the server's log may say why")
        sequence.sampler.remember(token)
        self.generated_tokens += 1
        logprobs: tuple[TokenLogprob, ...] = ()
        if top is not None:
            logprobs = tuple(token_logprobs(logits[row : row + 1], [token], top))
        sequence.append(token, logprobs)


def _drafted(ready: Ready, depth: int) -> int:
    """What was drafted for this row; -1 behind the last draft."""
    return ready.drafted[depth] if depth < len(ready.drafted) else -1


def _count(ready: Ready, depth: int, token: int) -> None:
    """Count what a client is told of its prediction; it is told with the token."""
    if token == _drafted(ready, depth):
        ready.sequence.accepted_prediction += 1
    else:
        ready.sequence.rejected_prediction += len(ready.drafted) - depth
