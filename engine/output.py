"""The engine's output while it generates: pieces of text with their tokens, then a finish reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a sequence ended. ERROR is an internal fault, REFUSED an error of the request that was detected
    late."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REFUSED = "refused"


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability, and the most likely alternatives as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """New output of one sequence.

    text        text that is final: complete UTF-8, and not part of a possible stop string
    special_ranges   `[start, end)` offsets into `text` of added tokens; None if unknown
    token_ids   tokens generated since the last Output (their text may come later)
    logprobs    one per token id, if requested
    prompt_logprobs  in the first Output, if requested; one per prompt token, the first one None
    finish_reason    set in the last Output
    error       the error message, if finish_reason is ERROR or REFUSED
    stop_match  the stop string or stop token id that ended it
    queue_s     in the first Output: seconds from submission until the prompt was first computed
    cached_tokens    in the first Output: prompt tokens from the prefix cache
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    stop_match: str | int | None = None
    queue_s: float | None = None
    cached_tokens: int | None = None
    special_ranges: tuple[tuple[int, int], ...] | None = None

    def joined(self, then: Output) -> Output:
        """This output and the next one of the same sequence, merged."""
        special = None
        if self.special_ranges is not None and then.special_ranges is not None:
            shift = len(self.text)
            shifted = ((start + shift, end + shift) for start, end in then.special_ranges)
            special = (*self.special_ranges, *shifted)
        return Output(
            text=self.text + then.text,
            token_ids=self.token_ids + then.token_ids,
            logprobs=self.logprobs + then.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=then.finish_reason,
            error=then.error,
            stop_match=then.stop_match,
            queue_s=self.queue_s,
            cached_tokens=self.cached_tokens,
            special_ranges=special,
        )
