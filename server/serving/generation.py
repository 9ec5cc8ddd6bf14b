"""From the engine's thread to the event loop: the sequences of one request, read as they are generated.

The engine calls back from its own thread; `Generation` collects outputs, and `Wakeups` (wakeups.py) tells its
reader when to look. Leaving a Generation early aborts its sequences, which frees their slots.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial

from engine.engine import PromptProgress, Submission
from engine.output import FinishReason, Output, joined
from engine.sampling.params import SamplingParams
from server.http.errors import ApiError, unavailable
from server.metrics import Metrics, SequenceTimer
from server.serving.answering import Answering
from server.serving.streaming import CLIENT_CLOSED_REQUEST
from server.serving.wakeups import Wakeups


class Generation:
    """The sequences of one request. Create, submit and read on the event loop."""

    def __init__(
        self,
        engine: Answering,
        metrics: Metrics,
        wakeups: Wakeups,
        timeout_s: float | None,
        cache_salt: str,
    ) -> None:
        self._engine = engine
        self._cache_salt = cache_salt
        self._metrics = metrics
        self._wakeups = wakeups
        self._inbox: deque[tuple[int, Output]] = deque()
        self._arrived = asyncio.Event()
        self._running: dict[int, Submission] = {}
        self._prompts: list[PromptProgress] = []  # by sequence, as far as the last look
        self._ended_by: ApiError | None = None
        loop = asyncio.get_running_loop()
        self._alarm = None if timeout_s is None else loop.call_later(timeout_s, self._expire, timeout_s)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        prediction: Sequence[int] = (),
    ) -> None:
        """Add a sequence; sequences are numbered in this order. Raises what Engine.submit raises."""
        index = len(self._prompts)
        on_output = partial(self._on_output, index, SequenceTimer(self._metrics))
        self._running[index] = self._engine.submit(
            prompt_ids, params, on_output, cache_salt=self._cache_salt, prediction=prediction
        )
        self._prompts.append(PromptProgress(len(prompt_ids), 0, 0))

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """(sequence number, new output) until all sequences have ended.

        Several Outputs of a sequence that are ready together come as one, except that log probabilities stay
        with the text of their token. Raises ApiError where a sequence fails, is ended from outside or takes
        longer than the time limit.
        """
        while self._running:
            await self._arrived.wait()
            self._arrived.clear()
            for index, output in self._drain():
                yield index, self._checked(index, output)
            if self._running and self._ended_by is not None:
                raise self._ended_by

    def prompt_progress(self) -> PromptProgress | None:
        """How much of the prompts has been computed; None before that of the first begins."""
        for index, ticket in self._running.items():
            known = self._prompts[index]
            if known.processed < known.total:
                new = self._engine.prompt_progress(ticket) or known
                # What was put aside may be computed again: its client sees it wait, and nothing undone.
                self._prompts[index] = new._replace(processed=max(known.processed, new.processed))
        if not any(each.processed for each in self._prompts):
            return None
        return PromptProgress(*map(sum, zip(*self._prompts, strict=True)))

    def cancel(self) -> None:
        """Abort whatever still runs, and report the cancellation to the reader."""
        # As if its client had left; clients repeat requests that end with 409 or 5xx.
        text = "the request was cancelled"
        self._ended_by = ApiError(CLIENT_CLOSED_REQUEST, text, code="request_cancelled")
        self._abort()
        self._arrived.set()

    def close(self) -> None:
        """Abort whatever still runs."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._abort()
        self._running.clear()

    def _abort(self) -> None:
        for ticket in self._running.values():
            self._engine.abort(ticket)

    def _on_output(self, index: int, timer: SequenceTimer, output: Output) -> None:
        # Runs in the engine's thread.
        timer.observe(output)
        self._inbox.append((index, output))
        is_first, is_last = output.cached_tokens is not None, output.finish_reason is not None
        self._wakeups.add(self._arrived, at_once=is_first or is_last)
        if is_first or is_last:
            self._wakeups.flush()  # what the engine does with the state now is nothing to wait for

    def _expire(self, timeout_s: float) -> None:
        message = f"the request took longer than {timeout_s:g} s and was ended; ask for fewer tokens"
        self._ended_by = ApiError(504, message, code="request_timeout")
        self._arrived.set()

    def _drain(self) -> list[tuple[int, Output]]:
        arrived: dict[int, list[Output]] = {}
        while self._inbox:
            index, output = self._inbox.popleft()
            arrived.setdefault(index, []).append(output)
        return [
            (index, output)
            for index, outputs in arrived.items()
            for output in (outputs if outputs[-1].logprobs else [joined(outputs)])
        ]

    def _checked(self, index: int, output: Output) -> Output:
        if output.cached_tokens is not None:
            total = self._prompts[index].total
            self._prompts[index] = PromptProgress(total, output.cached_tokens, total)
        if output.finish_reason is not None:
            self._running.pop(index, None)
        if output.finish_reason is FinishReason.ERROR:
            why = output.error or "the engine failed"
            raise unavailable(why, output.code) if output.code else ApiError(500, why, code="engine_error")
        if output.finish_reason is FinishReason.REFUSED:
            why, code = output.error or "the request cannot be answered", output.code or "invalid_grammar"
            raise ApiError(400, why, param=output.param, code=code)
        if output.finish_reason is FinishReason.ABORT:
            stopped = unavailable("the engine stopped before the answer was finished", "engine_stopped")
            raise self._ended_by or stopped
        return output
