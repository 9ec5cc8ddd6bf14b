"""One sequence on its way through the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.cache.aside import Kept
from engine.output import FinishReason, Output, TokenLogprob
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import Sampler
from engine.tokenizer.detokenizer import Detokenizer, Piece

logger = logging.getLogger("loci.engine")

OnOutput = Callable[[Output], None]


@dataclass(eq=False)
class Sequence:
    """A prompt and the answer generated so far.

    computed counts the tokens that the cache holds; slot is the cache slot, None while waiting.
    `max_tokens` is what the parameters and the context leave room for. Of the prompt, `cached_tokens`
    came from the prefix cache; the prefill pauses at `stops`, for the states there to be saved. A sequence
    that was put aside begins again with a prefill of `prefill_length` tokens, of which `kept` has a part;
    `has_computed` says whether it had computed any itself by then.
    `prediction` is what its client expects the answer to be, of which `accepted_prediction` tokens were
    drafted and right, and `rejected_prediction` wrong.
    """

    sequence_id: int
    token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    sampler: Sampler
    detokenizer: Detokenizer
    on_output: OnOutput
    cache_salt: str = ""
    prediction: tuple[int, ...] = ()
    prompt_length: int = field(init=False)
    prompt_hash: int = field(init=False)
    submitted_s: float = field(default_factory=time.perf_counter)
    queue_s: float | None = None
    slot: int | None = None
    computed: int = 0
    prefill_length: int = field(init=False)
    kept: Kept | None = None
    cached_tokens: int = 0
    has_computed: bool = False
    stops: tuple[int, ...] = ()
    saved: int = 0  # length of the last state saved to the prefix cache
    is_aborted: bool = False  # no reader any more; it ends before the next step
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    accepted_prediction: int = 0
    rejected_prediction: int = 0
    _reported: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = self.prefill_length = len(self.token_ids)
        self.prompt_hash = hash((self.cache_salt, tuple(self.token_ids)))
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)  # nothing predicts the first token

    @property
    def pending(self) -> int:
        """Tokens not in the cache yet: the rest of the prompt, or the newest token."""
        return len(self.token_ids) - self.computed

    @property
    def next_stop(self) -> int:
        """How many tokens will have been computed when its state is next saved, its prompt is done or a token
        is sampled."""
        stops = (*self.stops, self.prompt_length)
        return min((stop for stop in stops if stop > self.computed), default=len(self.token_ids))

    @property
    def is_prefilling(self) -> bool:
        """True until the whole prompt has been computed, or all that was known when it was put aside."""
        return self.computed < self.prefill_length

    @property
    def was_aside(self) -> bool:
        """True where it has had a slot before, and gave it up."""
        return self.queue_s is not None and self.slot is None

    def put_aside(self, kept: Kept | None) -> None:
        """It has no slot any more, and goes on from `kept`, or from the beginning."""
        self.has_computed |= self.generated > 0 or self.computed > self.cached_tokens
        self.kept, self.computed, self.stops = kept, 0, () if kept is None else self.stops
        self.prefill_length = len(self.token_ids)

    @property
    def generated(self) -> int:
        """Number of answer tokens so far."""
        return len(self.token_ids) - self.prompt_length

    def append(self, token_id: int, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Append a token, report the text it completes, and finish if it ends the answer."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish(FinishReason.STOP, (token_id,), logprobs, stop_match=token_id)
            return
        piece = self.detokenizer.push(token_id, may_stop=self.generated > self.params.min_tokens)
        if piece.stop is not None:
            self.finish(FinishReason.STOP, (token_id,), logprobs, stop_match=piece.stop, piece=piece)
        elif self.generated >= self.max_tokens:
            self.finish(FinishReason.LENGTH, (token_id,), logprobs, piece=piece)
        else:
            self._report(Output(piece.text, (token_id,), logprobs, special_ranges=piece.special_ranges))

    def finish(
        self,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        *,
        piece: Piece | None = None,
        stop_match: str | int | None = None,
        error: str | None = None,
    ) -> None:
        """Report the last Output, with all remaining text (unless there was an error)."""
        piece = piece or Piece("")
        if error is None and not isinstance(stop_match, str):
            piece = piece.joined(self.detokenizer.finish())
            if piece.stop is not None:
                reason, stop_match = FinishReason.STOP, piece.stop
        self.finish_reason = reason
        self._report(
            Output(
                piece.text,
                token_ids,
                logprobs,
                None,
                reason,
                error,
                stop_match,
                special_ranges=piece.special_ranges,
            )
        )

    def _report(self, output: Output) -> None:
        if not self._reported:
            self._reported = True
            prompt_logprobs = None if self.params.prompt_logprobs is None else tuple(self.prompt_logprobs)
            output = output._replace(
                prompt_logprobs=prompt_logprobs,
                queue_s=self.queue_s,
                cached_tokens=self.cached_tokens,
            )
        if self.prediction:
            output = output._replace(predicted=(self.accepted_prediction, self.rejected_prediction))
        try:
            self.on_output(output)
        except Exception:  # a failing handler must not fail the other sequences of the step
            logger.exception("the output handler of sequence %d failed", self.sequence_id)
