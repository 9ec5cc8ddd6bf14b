"""Replicas as one engine: each sequence is computed by one of them, and what it generates comes back here.

A replica that dies takes its sequences with it. They are given to another one, which computes them again from
the beginning; since the bits are the same, so are the tokens, and those that were sent before are left out.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engine.cache.digest import block_hashes
from engine.engine import EngineStats, PromptProgress, Submission
from engine.families.base import Batch, KvCache, Model, ModelInfo, Trace
from engine.grammar.constraint import GrammarCompiler
from engine.output import FinishReason, Output
from engine.prompt_check import check_prompt
from engine.sampling.params import SamplingParams
from engine.sequence import OnOutput
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import CapacityError, LociError
from server.cluster.affinity import Affinity
from server.cluster.asked import Asked, ReplicaInfo
from server.http.errors import unavailable

log = logging.getLogger("loci")

ATTEMPTS = 4  # replicas that a sequence is given to, one after the other
SEED_BITS = 32
LOOK_S = 0.5  # how often whoever waits for a replica looks whether there is one
PATIENCE_S = 20.0  # for the first replica: a router knows of them a moment after they have begun
END_S = 90.0  # that the replicas are taken away in, if Serve answers at all
NO_REPLICA = "no_replica"
NONE_UP = "no replica of the model is up; they are being started again: try again soon"


class ReplicaGoneError(LociError):
    """No replica can compute a sequence now; there may be one soon."""


class RemoteModel(Model):
    """What is known here of a model whose replicas are elsewhere."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def new_cache(self, slots: int, capacity: int) -> KvCache:
        raise NotImplementedError("its caches are with the replicas")

    def cache_bytes(self, slots: int, capacity: int) -> int:
        """None in this process."""
        return 0

    def _step(self, batch: Batch, cache: KvCache, trace: Trace | None) -> torch.Tensor:
        raise NotImplementedError("its replicas compute steps")


class ReplicatedEngine:
    """See `server.serving.answering.Answering`. Submit on the event loop.

    handle       of the replicas' deployment, for streams
    means_loss   whether an error of a call means that its replica is gone
    when_stopped called at the end
    """

    def __init__(
        self,
        handle: Any,
        affinity: Affinity,
        tokenizer: Tokenizer,
        info: ModelInfo,
        replica: ReplicaInfo,
        max_waiting: int,
        means_loss: Callable[[BaseException], bool],
        when_stopped: Callable[[], None],
    ) -> None:
        self.grammars = GrammarCompiler(tokenizer, info.eos_token_ids, info.vocab_size)
        self.between_steps: Callable[[], None] = _nothing
        self.affinity = affinity
        self.retried = 0  # sequences that were given to another replica
        self._handle = handle
        self._info, self._replica = info, replica
        self._max_waiting = max_waiting
        self._means_loss, self._when_stopped = means_loss, when_stopped
        self._ids = itertools.count(1)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._progress: dict[int, PromptProgress] = {}
        self._is_stopped = False
        self._stopping, self._has_ended = threading.Lock(), threading.Event()

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and answer together."""
        return self.affinity.context or self._replica.context

    @property
    def is_alive(self) -> bool:
        """True until it is stopped: replicas that die are started again."""
        return not self._is_stopped

    @property
    def is_ready(self) -> bool:
        """True while there is a replica."""
        return self.is_alive and self.affinity.up > 0

    @property
    def max_sequences(self) -> int:
        """Sequences that all replicas together compute at once."""
        return self._replica.slots * max(1, self.affinity.up)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: OnOutput,
        *,
        cache_salt: str = "",
        prediction: Sequence[int] = (),
    ) -> Submission:
        """Give a sequence to a replica; `on_output` is called on this event loop.

        Raises RequestError for what `check_prompt` refuses, CapacityError where too many wait, ApiError 503
        while there is no replica.
        """
        check_prompt(prompt_ids, params, self._info.vocab_size, self.max_context)
        if self._is_stopped:
            raise CapacityError("the engine is not running; ask the server's operator to restart it")
        if self.affinity.gone and not self.affinity.up:
            raise unavailable(NONE_UP, NO_REPLICA)
        if len(self._running) >= self.max_sequences + self._max_waiting:
            text = f"{self.max_sequences} requests are running and {self._max_waiting} are already waiting"
            raise CapacityError(f"{text}; try again later")
        prompt = np.asarray(prompt_ids, dtype=np.int32)
        if params.seed is None and params.temperature:
            params = replace(params, seed=secrets.randbits(SEED_BITS))
        blocks = block_hashes(prompt, cache_salt)
        asked = Asked(prompt, params, cache_salt, tuple(prediction), blocks)
        number = next(self._ids)
        # In a context of its own: Serve would take several sequences of a request for one call.
        task = asyncio.get_running_loop().create_task(
            self._compute(number, asked, on_output), context=contextvars.Context()
        )
        self._running[number] = task
        task.add_done_callback(lambda _: self._forget(number))
        return Submission(number)

    def abort(self, ticket: Submission) -> None:
        """End a sequence; its replica frees its slot within a step. No-op if it has ended."""
        task = self._running.get(ticket.sequence_id)
        if task is not None:
            with suppress(RuntimeError):  # the loop has closed, and ended it
                task.get_loop().call_soon_threadsafe(task.cancel)

    def foresee(self, cache_salt: str, beginning: list[int]) -> None:
        """Nothing: states on disk are not kept with replicas."""

    def prompt_progress(self, ticket: Submission) -> PromptProgress | None:
        """How much of a sequence's prompt has been computed, as its replica has told."""
        return self._progress.get(ticket.sequence_id)

    def stats(self) -> EngineStats:
        """The figures of all replicas together, up to a second old."""
        return self.affinity.stats()

    def stop(self) -> None:
        """End what runs, and the replicas. Whoever comes second waits until the first is done."""
        with self._stopping:
            is_first, self._is_stopped = not self._is_stopped, True
        if not is_first:
            self._has_ended.wait(END_S)
            return
        try:
            for number in list(self._running):
                self.abort(Submission(number))
            self.grammars.close()
            self._when_stopped()
        finally:
            self._has_ended.set()

    async def _compute(self, number: int, asked: Asked, on_output: OnOutput) -> None:
        """Report what replicas generate, or why it ended."""
        last = Output(finish_reason=FinishReason.ABORT)
        try:
            await self._by_some_replica(number, asked, on_output)
            return
        except asyncio.CancelledError:
            pass  # aborted
        except ReplicaGoneError as error:
            last = Output(finish_reason=FinishReason.ERROR, error=str(error), code=NO_REPLICA)
        except Exception as error:
            log.exception("a replica failed")
            last = Output(finish_reason=FinishReason.ERROR, error=f"{type(error).__name__} in a replica")
        on_output(last)
        self.between_steps()

    async def _by_some_replica(self, number: int, asked: Asked, on_output: OnOutput) -> None:
        """Raises ReplicaGoneError where none computes it to its end."""
        sent: list[int] = []
        for _ in range(ATTEMPTS):
            attempt, response, is_over = self.affinity.begin(), None, False
            try:
                again = replace(asked, sent=tuple(sent), attempt=attempt)
                response = self._handle.generate.remote(again)
                each = await self._first(response)
                while True:
                    if isinstance(each, PromptProgress):
                        self._progress[number] = each
                    else:
                        self._progress.pop(number, None)
                        for output in each:
                            sent += output.token_ids
                            on_output(output)
                        self.between_steps()
                        is_over = each[-1].finish_reason is not None
                        if is_over:
                            return
                    each = await anext(response)
            except ReplicaGoneError:
                raise
            except (Exception, asyncio.CancelledError) as error:
                if not self._is_lost(error):
                    raise
                self.retried += 1
                self._progress.pop(number, None)
                log.warning(
                    "a replica is gone; a sequence of which %d tokens were sent goes to another", len(sent)
                )
            finally:
                self.affinity.end(attempt)
                if response is not None and not is_over:
                    response.cancel()
        raise ReplicaGoneError(NONE_UP)

    async def _first(self, response: Any) -> Any:
        """What a replica sends first. Raises ReplicaGoneError while there is none."""
        arriving = asyncio.ensure_future(anext(response))
        waited_s = 0.0
        try:
            while True:
                done, _ = await asyncio.wait({arriving}, timeout=LOOK_S)
                if done:
                    return arriving.result()
                waited_s = waited_s + LOOK_S if not self.affinity.up else 0.0
                if waited_s >= PATIENCE_S or (waited_s and self.affinity.gone):
                    raise ReplicaGoneError(NONE_UP)
        finally:
            arriving.cancel()

    def _is_lost(self, error: BaseException) -> bool:
        """Whether a call ended because its replica is gone."""
        if isinstance(error, asyncio.CancelledError):  # of the call, or of whoever waits for it
            task = asyncio.current_task()
            return task is not None and not task.cancelling()
        return isinstance(error, StopAsyncIteration) or self._means_loss(error)

    def _forget(self, number: int) -> None:
        self._running.pop(number, None)
        self._progress.pop(number, None)


def _nothing() -> None:
    pass
