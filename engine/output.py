"""The engine's output while it generates: pieces of text with their tokens, then a finish reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
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
    code, param what clients know the error by, and the field at fault; an ERROR with a code passes
    stop_match  the stop string or stop token id that ended it
    queue_s     in the first Output: seconds from submission until the prompt was first computed
    cached_tokens    in the first Output: prompt tokens from the prefix cache
    predicted   of what the client expected, how many tokens were drafted and right so far, and how many wrong
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
    predicted: tuple[int, int] = (0, 0)
    code: str | None = None
    param: str | None = None


def joined(outputs: Sequence[Output]) -> Output:
    """Outputs of one sequence, which followed each other, as one."""
    first, last = outputs[0], outputs[-1]
    if first is last:
        return first
    return Output(
        text="".join(output.text for output in outputs),
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        logprobs=tuple(chain.from_iterable(output.logprobs for output in outputs)),
        prompt_logprobs=first.prompt_logprobs,
        finish_reason=last.finish_reason,
        error=last.error,
        stop_match=last.stop_match,
        queue_s=first.queue_s,
        cached_tokens=first.cached_tokens,
        special_ranges=_joined_ranges(outputs),
        predicted=last.predicted,
        code=last.code,
        param=last.param,
    )


def _joined_ranges(outputs: Sequence[Output]) -> tuple[tuple[int, int], ...] | None:
    ranges: list[tuple[int, int]] = []
    before = 0  # characters
    for output in outputs:
        if output.special_ranges is None:
            return None
        ranges += ((before + start, before + end) for start, end in output.special_ranges)
        before += len(output.text)
    return tuple(ranges)
