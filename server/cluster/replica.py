"""A replica: a whole model with its own engine, caches and plan, which computes sequences that it is sent.

Serve starts it, looks after it and starts it again. HTTP, keys, limits, prompts' tokens and stored responses
are where the replicas are called from (replicated.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, NoReturn

import torch

from engine.cache.digest import PrefixDigest
from engine.cache.prefix import PrefixCache
from engine.engine import PromptProgress, Submission
from engine.grammar.lark import Grammar
from engine.output import FinishReason, Output, joined
from quant.errors import CapacityError, LociError, RequestError
from server.cluster.asked import STATE, Answered, Asked, ReplicaInfo, ReplicaState
from server.cluster.on_machine import on_this_machine
from server.serving.service import bring_up, prepare
from server.serving.streaming import PULSE_S
from server.serving.wakeups import Wakeups
from server.settings import Settings

log = logging.getLogger("loci")

COMPILE_AGAIN_S = 0.05
DIFFERS = "a replica of the model is gone, and another one would have answered otherwise; ask again"


class Replica:
    """What Serve runs on a machine.

    settings  as `passed` gives them, and how many replicas share a machine (`sharing`)
    """

    def __init__(self, settings: dict[str, Any], sharing: int = 1) -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // sharing))
        listen_where_ray_does()
        own = on_this_machine(settings)
        prepared = prepare(Settings(**own))
        self._engine = bring_up(prepared).engine_here
        self._interval_s = prepared.settings.stream_interval_ms / 1000
        self._slots = prepared.planned.workload.sequences
        self._wakeups: Wakeups | None = None  # made on the event loop
        prefixes = self._engine.prefixes
        self._digest = PrefixDigest(prefixes) if isinstance(prefixes, PrefixCache) else None

    def describe(self) -> ReplicaInfo:
        """What it can do."""
        return ReplicaInfo(self._engine.max_context, self._slots)

    async def generate(self, asked: Asked) -> AsyncIterator[Answered]:
        """What a sequence generates, as it comes, behind what was sent before. Who stops reading has it
        aborted."""
        engine, wakeups = self._engine, self._begin()
        inbox: deque[Output] = deque()
        arrived = asyncio.Event()

        def on_output(output: Output) -> None:  # in the engine's thread
            inbox.append(output)
            at_once = output.cached_tokens is not None or output.finish_reason is not None
            wakeups.add(arrived, at_once=at_once)
            if at_once:
                wakeups.flush()

        try:
            if asked.params.grammar is not None:
                await self._compile(asked.params.grammar)
            ticket = engine.submit(
                asked.prompt.tolist(),
                asked.params,
                on_output,
                cache_salt=asked.cache_salt,
                prediction=asked.prediction,
            )
        except LociError as error:
            if not engine.is_alive:
                leave()
            yield [refusal(error)]
            return
        try:
            sent = deque(asked.sent)
            async for each in self._outputs(ticket, inbox, arrived):
                if not isinstance(each, PromptProgress) and each[-1].finish_reason is FinishReason.ABORT:
                    leave()  # nobody here has asked for it
                new = each if isinstance(each, PromptProgress) else unsent(each, sent)
                if new:
                    yield new
                if not isinstance(new, PromptProgress) and new and new[-1].finish_reason is not None:
                    return
        finally:
            engine.abort(ticket)

    async def _compile(self, grammar: Grammar) -> None:
        """Waits where many are being compiled: the front has accepted this one. Raises RequestError."""
        while True:
            try:
                compiled = self._engine.grammars.compile(grammar)
            except CapacityError:
                await asyncio.sleep(COMPILE_AGAIN_S)
            else:
                await asyncio.wrap_future(compiled)
                return

    async def _outputs(
        self, ticket: Submission, inbox: deque[Output], arrived: asyncio.Event
    ) -> AsyncIterator[Answered]:
        has_begun = is_over = False
        while not is_over:
            with suppress(TimeoutError):
                async with asyncio.timeout(None if has_begun else PULSE_S):
                    await arrived.wait()
            arrived.clear()
            ready = [inbox.popleft() for _ in range(len(inbox))]
            if ready:
                has_begun, is_over = True, ready[-1].finish_reason is not None
                yield ready
            elif (progress := self._engine.prompt_progress(ticket)) is not None:
                yield progress

    def record_routing_stats(self) -> dict[str, ReplicaState]:
        """Serve asks for it every second, and tells its routers."""
        hashes = b"" if self._digest is None else self._digest.hashes
        return {STATE: ReplicaState(hashes, self._engine.max_context, self._slots, self._engine.stats())}

    def check_health(self) -> None:
        """Serve starts it again where this raises."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine's thread has ended")

    def process(self) -> int:
        """The number of its process."""
        return os.getpid()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)  # none where it could not be loaded
        if engine is not None:
            engine.stop()

    def _begin(self) -> Wakeups:
        if self._wakeups is None:
            self._wakeups = Wakeups(self._interval_s)
            self._engine.between_steps = self._between_steps
        return self._wakeups

    def _between_steps(self) -> None:
        if self._wakeups is not None:
            self._wakeups.flush()
        if self._digest is not None:
            self._digest.refresh(at_once=not self._engine.has_work)


def unsent(outputs: list[Output], sent: deque[int]) -> list[Output]:
    """Of new outputs, those behind the tokens that were `sent` before, which are taken out of it; those that
    need not be told apart, as one. An error where the tokens are others, or end before those."""
    new = []
    for output in outputs:
        if sent and output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            return [Output(finish_reason=FinishReason.ERROR, error=DIFFERS)]
        if sent and output.token_ids:
            if output.token_ids[0] != sent.popleft():
                return [Output(finish_reason=FinishReason.ERROR, error=DIFFERS)]
        else:
            new.append(output)
    return new if not new or new[-1].logprobs else [joined(new)]


def refusal(error: LociError) -> Output:
    """What a sequence ends with that the engine does not take."""
    if isinstance(error, RequestError):
        reason = FinishReason.REFUSED
        return Output(finish_reason=reason, error=str(error), code=error.code, param=error.param)
    code = "queue_full" if isinstance(error, CapacityError) else None
    return Output(finish_reason=FinishReason.ERROR, error=str(error), code=code)


def leave() -> NoReturn:
    """End this process, whose engine has died: its sequences go to other replicas, and Serve starts it again.

    As long as it stayed, it would look idle and be given everything.
    """
    log.error("the engine's thread has ended; this replica ends, to be started again")
    os._exit(1)


def listen_where_ray_does() -> None:
    """Serve opens a port for calls between deployments on every address of a machine; nothing uses it here.
    Let it be on Ray's own address, which is loopback unless the operator has said otherwise."""
    import ray
    from ray.serve._private import replica

    address = ray.util.get_node_ip_address()
    bind = replica.add_port_to_grpc_server

    def bind_there(server: Any, port: str) -> Any:
        return bind(server, port.replace("[::]", f"[{address}]" if ":" in address else address))

    replica.add_port_to_grpc_server = bind_there
