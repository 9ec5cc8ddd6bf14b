"""The engine: a step loop in its own thread that turns submitted prompts into tokens.

Submissions and aborts come from other threads through an inbox that is emptied between steps (steps.py).
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine.cache.aside import Aside, AsideOnDisk, AsideStats
from engine.cache.prefix import PrefixCache
from engine.cache.prefixes import Prefixes, PrefixStats
from engine.cache.stored_states import StatesOnDisk, StoredStates, StoredStats
from engine.drafts.base import Drafter
from engine.drafts.drafting import Drafting
from engine.drafts.kept import KeptStates
from engine.drafts.stats import DraftStats
from engine.families.base import Model, PromptProducts
from engine.grammar.constraint import GrammarCompiler
from engine.kv_pool import WHOLE, PoolSize, new_pool
from engine.output import FinishReason
from engine.prompt_check import check_prompt
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import Sampler
from engine.scheduler import Scheduler
from engine.sequence import OnOutput, Sequence
from engine.steps import Steps
from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import CapacityError, RequestError

logger = logging.getLogger("loci.engine")

# Of the prefix cache's memory, for states on their way to disk.
PENDING_SHARE = 0.25
# Tokens that are drafted for an answer in a step at most: a recorded step has as many rows, and one more.
MOST_DRAFTED = 15


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics; prompt_tokens, generated_tokens, steps and seconds only grow.

    step_s is the time spent in steps, forward_s the model's part of it. is_failing: the last step failed its
    requests through no fault of theirs. kv_bytes may be taken in all, programs and what does not grow
    included; kv_taken are the bytes of rows that each slot has now, of kv_budget_bytes, kv_on those on each
    device, and kv_peak_bytes the most that they had together.
    """

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    kv_bytes: int
    step_s: float
    forward_s: float
    prefixes: PrefixStats | None = None
    stored: StoredStats | None = None
    is_failing: bool = False
    kv_taken: tuple[int, ...] = ()
    kv_on: Mapping[torch.device, int] = field(default_factory=dict)
    kv_peak_bytes: int = 0
    kv_budget_bytes: int = 0
    sequences_aside: int = 0
    aside: AsideStats | None = None
    drafts: DraftStats | None = None


@dataclass(frozen=True)
class Submission:
    """A submitted sequence; `Engine.abort` takes it."""

    sequence_id: int


class PromptProgress(NamedTuple):
    """Tokens of a prompt: all of it, what was cached, and what the cache holds by now."""

    total: int
    cached: int
    processed: int


class Engine:
    """Runs sequences on a model. Thread-safe: submit and abort may be called from any thread.

    Up to max_sequences run at once, each of at most `max_context` tokens (prompt and answer), with KV from a
    pool whose size is planned here. A step computes at most `prefill_chunk` tokens; while answers run,
    prompts get only what takes about `prefill_step_s`. Up to `max_waiting` more sequences are queued, further
    ones refused. The states of prompts and answers are cached for later prompts with the same beginning, in
    up to `prefix_cache_bytes` (0 turns this off), and on disk too if `on_disk` says where. While the pool is
    short, the youngest sequence is put aside: in that memory, or to disk if `aside` says where; with neither,
    it is computed again. `prompt_products` says how prompts are multiplied, where not exactly. After each
    step, whose outputs are reported one by one, the engine's thread calls `between_steps`. `drafters` guess
    tokens ahead, up to `draft_tokens` of an answer in a step, where that pays; `draft_costs` says what steps
    of so many tokens probably cost, in relation to one, until that is measured.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_sequences: int,
        max_context: int,
        pool: PoolSize = WHOLE,
        prefill_chunk: int = 512,
        prefill_step_s: float = math.inf,
        max_waiting: int = 256,
        prefix_cache_bytes: int = 0,
        on_disk: StatesOnDisk | None = None,
        aside: AsideOnDisk | None = None,
        prompt_products: PromptProducts | None = None,
        drafters: Ids[Drafter] = (),
        draft_tokens: int = MOST_DRAFTED,
        draft_costs: Callable[[int], float] | None = None,
        always_draft: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.grammars = GrammarCompiler(tokenizer, model.info.eos_token_ids, model.info.vocab_size)
        self._max_sequences, self._max_waiting = max_sequences, max_waiting
        if any(drafter.wants_captures for drafter in drafters):
            model.capture()
        context = min(max_context, model.info.max_context)
        self.pool = new_pool(model, max_sequences, context, pool, prefix_cache_bytes)
        self._cache, self._max_context = self.pool.cache, self.pool.context
        pending = int(prefix_cache_bytes * PENDING_SHARE) if on_disk is not None else 0
        self._stored = None if on_disk is None else StoredStates(self._cache, on_disk, pending)
        in_memory = prefix_cache_bytes - pending
        prefixes: Prefixes | None = self._cache.prefixes
        if prefixes is None and prefix_cache_bytes:
            prefixes = PrefixCache(self._cache, in_memory, self._stored)
        self._scheduler = Scheduler(
            max_sequences, prefill_chunk, prefill_step_s, shares_prompts=prefixes is not None
        )
        places = Aside(self._cache, prefixes, aside)
        kept = KeptStates(self._cache, prefixes, 1 + draft_tokens)
        if drafters and not kept.can_keep:
            logger.info(
                "nothing is drafted: that takes copies of states, in memory that a prefix cache lends"
            )
            drafters = ()
        drafting = Drafting(model, drafters, kept, draft_tokens, always=always_draft, guess=draft_costs)
        self._steps = Steps(
            model, self._cache, prefixes, places, self._scheduler, self._forget, drafting, prompt_products
        )
        self._ids = itertools.count(1)
        self._wake = threading.Condition()
        self._submitted: list[Sequence] = []
        self._aborted: list[Sequence] = []
        self._known: dict[int, Sequence] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="loci-engine", daemon=True)
        self.between_steps: Callable[[], None] = _nothing

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and answer together."""
        return self._max_context

    @property
    def max_sequences(self) -> int:
        """Sequences that are computed at once."""
        return self._max_sequences

    @property
    def prefixes(self) -> Prefixes | None:
        """What keeps states for later prompts, if anything: for the engine's thread (`between_steps`)."""
        return self._steps.prefixes

    @property
    def has_work(self) -> bool:
        """True while sequences run or wait."""
        return self._scheduler.has_work

    @property
    def is_alive(self) -> bool:
        """True while the step loop runs."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """True while a sequence that is submitted now can be computed."""
        return self.is_alive

    def start(self) -> None:
        """Start the step loop."""
        self._thread.start()

    def stop(self) -> None:
        """Abort running sequences and stop the step loop; returns once the thread has ended."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        if self._stored is not None:
            self._stored.close()
        self.grammars.close()

    def submit(
        self,
        prompt_ids: Ids[int],
        params: SamplingParams,
        on_output: OnOutput,
        *,
        cache_salt: str = "",
        prediction: Ids[int] = (),
    ) -> Submission:
        """Queue a sequence; `on_output` is called from the engine's thread with each Output.

        Cached prefixes are shared by sequences of the same `cache_salt` only. `prediction` is what its client
        expects the answer to be, which changes nothing but how soon it is there.
        Raises RequestError where the prompt is empty, has ids outside the vocabulary or does not
        leave room for a token (code `context_length_exceeded`) or the grammar is wrong (compile it with
        `grammars` beforehand: that takes time), CapacityError where the queue is full.
        """
        vocab_size = self.model.info.vocab_size
        ids = list(prompt_ids)
        check_prompt(ids, params, vocab_size, self._max_context)
        constraint = None if params.grammar is None else self.grammars.start(params.grammar)
        room = self._max_context - len(ids)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self.model.info.eos_token_ids)
        if params.min_tokens and len(stop_ids) >= vocab_size:
            raise RequestError("min_tokens cannot be met: every token is a stop token", param="min_tokens")
        sequence = Sequence(
            sequence_id=next(self._ids),
            token_ids=ids,
            params=params,
            max_tokens=min(params.max_tokens or room, room),
            stop_token_ids=frozenset(stop_ids),
            sampler=Sampler(params, ids, constraint, stop_ids),
            detokenizer=Detokenizer(
                self.tokenizer,
                params.stop,
                include_stop=params.include_stop,
                skip_special=params.skip_special,
            ),
            on_output=on_output,
            cache_salt=cache_salt,
            prediction=tuple(prediction),
        )
        with self._wake:
            if self._stopping or not self.is_alive:
                raise CapacityError("the engine is not running; ask the server's operator to restart it")
            if self._unfinished() >= self._max_sequences + self._max_waiting:
                running, waiting = self._max_sequences, self._max_waiting
                text = f"{running} requests are running and {waiting} are already waiting; try again later"
                raise CapacityError(text)
            self._submitted.append(sequence)
            self._known[sequence.sequence_id] = sequence
            self._wake.notify()
        if self._stored is not None:
            self._stored.expect(ids, cache_salt)
        return Submission(sequence.sequence_id)

    def foresee(self, cache_salt: str, beginning: list[int]) -> None:
        """A prompt that begins so will be submitted soon: let the system read ahead what is on disk of it.
        Thread-safe."""
        if self._stored is not None:
            self._stored.foresee(beginning, cache_salt)

    def abort(self, ticket: Submission) -> None:
        """End a sequence within one step; its last Output has FinishReason.ABORT. No-op if it ended."""
        with self._wake:
            sequence = self._known.get(ticket.sequence_id)
            if sequence is not None:
                sequence.is_aborted = True
                self._aborted.append(sequence)
                self._wake.notify()

    def prompt_progress(self, ticket: Submission) -> PromptProgress | None:
        """How much of a sequence's prompt has been computed; None once it is done, or the sequence ended."""
        sequence = self._known.get(ticket.sequence_id)
        if sequence is None or not sequence.is_prefilling:
            return None
        return PromptProgress(sequence.prompt_length, sequence.cached_tokens, sequence.computed)

    def stats(self) -> EngineStats:
        """Current counters and gauges."""
        running, waiting, steps = list(self._scheduler.running), list(self._scheduler.waiting), self._steps
        return EngineStats(
            running=len(running),
            waiting=len(waiting) + len(self._submitted),
            prompt_tokens=steps.prompt_tokens,
            generated_tokens=steps.generated_tokens,
            steps=steps.count,
            kv_tokens_used=sum(s.computed for s in running),
            kv_tokens_capacity=self.pool.tokens,
            kv_bytes=self._cache.nbytes,
            kv_taken=self._cache.pages.of_slots(),
            kv_on=self._cache.pages.taken,
            kv_peak_bytes=self._cache.pages.peak_bytes,
            kv_budget_bytes=self.pool.nbytes,
            step_s=steps.step_s,
            forward_s=steps.forward_s,
            prefixes=None if steps.prefixes is None else steps.prefixes.stats,
            stored=None if self._stored is None else self._stored.stats,
            is_failing=steps.is_failing,
            sequences_aside=sum(sequence.was_aside for sequence in waiting),
            aside=steps.aside.stats,
            drafts=steps.drafting.stats if steps.drafting.is_on else None,
        )

    def _loop(self) -> None:
        try:
            while self._drain_inbox():
                self._steps.run()
                self.between_steps()
        except BaseException:
            logger.exception("the engine's step loop ended")
            raise
        finally:
            with self._wake:
                self._stopping = True
            for sequence in list(self._known.values()):
                self._steps.end(sequence, FinishReason.ABORT)
            self.between_steps()

    def _drain_inbox(self) -> bool:
        """Process submissions and aborts, waiting for them when idle; False when it is time to stop."""
        if self._scheduler.has_work and not (self._submitted or self._aborted or self._stopping):
            return True  # as nearly always; what comes at this moment is seen after the step
        with self._wake:
            while not (self._submitted or self._aborted or self._scheduler.has_work or self._stopping):
                self._wake.wait()
            submitted, self._submitted = self._submitted, []
            aborted, self._aborted = self._aborted, []
            stopping = self._stopping
            for sequence in submitted:
                self._scheduler.add(sequence)
        for sequence in aborted:
            if sequence.sequence_id in self._known:
                self._steps.end(sequence, FinishReason.ABORT)
        return not stopping

    def _forget(self, sequence: Sequence) -> bool:
        """Drop an ended sequence from the books; True if it was scheduled."""
        with self._wake:
            self._known.pop(sequence.sequence_id, None)
            if sequence in self._submitted:
                self._submitted.remove(sequence)
                return False
        return True

    def _unfinished(self) -> int:
        """Sequences that hold a slot or wait for one. Those that were aborted or have just finished leave
        before the next one is admitted, so they do not count. Holds the lock."""
        return sum(s.finish_reason is None and not s.is_aborted for s in self._known.values())


def _nothing() -> None:
    pass
