"""The engine: a step loop in its own thread that turns submitted prompts into tokens.

One step: schedule chunks, run the model on them, sample and report. Submissions and aborts come
from other threads through an inbox that is emptied between steps.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

import torch

from engine.assemble import assemble
from engine.cache.prefix import PrefixCache, PrefixStats
from engine.families.base import KvCache, Model
from engine.grammar.constraint import GrammarCompiler
from engine.output import FinishReason, TokenLogprob
from engine.sampling.draw import draw_tokens
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import Sampler, token_logprobs
from engine.scheduler import Chunk, Scheduler
from engine.sequence import OnOutput, Sequence
from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.tokenizer import Tokenizer
from memory.hardware.detect import available_memory_bytes
from quant.errors import BudgetError, CapacityError, LociError, RequestError

logger = logging.getLogger("loci.engine")

# While a long prompt is computed, its state is saved every so many tokens, for prompts that share only its
# beginning.
SAVE_EVERY = 2048


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics; prompt_tokens, generated_tokens, steps and seconds only grow.

    step_s is the time spent in steps, forward_s the model's part of it. is_failing: the last step failed its
    requests through no fault of theirs.
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
    is_failing: bool = False


@dataclass(frozen=True)
class Submission:
    """A submitted sequence; `Engine.abort` takes it."""

    sequence_id: int


class Engine:
    """Runs sequences on a model. Thread-safe: submit and abort may be called from any thread.

    Up to max_sequences run at once, each of at most `max_context` tokens (prompt and answer); the cache
    for them is allocated here. A step computes at most `prefill_chunk` tokens; while answers run, prompts get
    only what takes about `prefill_step_s`. Up to `max_waiting` more sequences are queued, further ones
    refused. The states of prompts and answers are cached for later prompts with the same beginning, in up to
    `prefix_cache_bytes` (0 turns this off). After each step, whose outputs are reported one by one, the
    engine's thread calls `between_steps`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_sequences: int,
        max_context: int,
        prefill_chunk: int = 512,
        prefill_step_s: float = math.inf,
        max_waiting: int = 256,
        prefix_cache_bytes: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.grammars = GrammarCompiler(tokenizer, model.info.eos_token_ids, model.info.vocab_size)
        self._max_context = min(max_context, model.info.max_context)
        self._max_sequences, self._max_waiting = max_sequences, max_waiting
        self._cache = _allocate_cache(model, max_sequences, self._max_context, prefix_cache_bytes)
        self._prefixes = PrefixCache(self._cache, prefix_cache_bytes) if prefix_cache_bytes else None
        self._scheduler = Scheduler(
            max_sequences, prefill_chunk, prefill_step_s, shares_prompts=self._prefixes is not None
        )
        self._ids = itertools.count(1)
        self._wake = threading.Condition()
        self._submitted: list[Sequence] = []
        self._aborted: list[Sequence] = []
        self._known: dict[int, Sequence] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="loci-engine", daemon=True)
        self.between_steps: Callable[[], None] = _nothing
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._steps = 0
        self._step_s = self._forward_s = 0.0
        self._is_failing = False

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and answer together."""
        return self._max_context

    @property
    def is_alive(self) -> bool:
        """True while the step loop runs."""
        return self._thread.is_alive()

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
        self.grammars.close()

    def submit(
        self, prompt_ids: Ids[int], params: SamplingParams, on_output: OnOutput, *, cache_salt: str = ""
    ) -> Submission:
        """Queue a sequence; `on_output` is called from the engine's thread with each Output.

        Cached prefixes are shared by sequences of the same `cache_salt` only.
        Raises RequestError where the prompt is empty, has ids outside the vocabulary or does not
        leave room for a token (code `context_length_exceeded`) or the grammar is wrong (compile it with
        `grammars` beforehand: that takes time), CapacityError where the queue is full.
        """
        vocab_size = self.model.info.vocab_size
        ids = list(prompt_ids)
        self._check_prompt(ids, params)
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
            sampler=Sampler(params, ids, vocab_size, constraint, stop_ids),
            detokenizer=Detokenizer(
                self.tokenizer,
                params.stop,
                include_stop=params.include_stop,
                skip_special=params.skip_special,
            ),
            on_output=on_output,
            cache_salt=cache_salt,
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
        return Submission(sequence.sequence_id)

    def abort(self, ticket: Submission) -> None:
        """End a sequence within one step; its last Output has FinishReason.ABORT. No-op if it ended."""
        with self._wake:
            sequence = self._known.get(ticket.sequence_id)
            if sequence is not None:
                sequence.is_aborted = True
                self._aborted.append(sequence)
                self._wake.notify()

    def stats(self) -> EngineStats:
        """Current counters and gauges."""
        running = list(self._scheduler.running)
        return EngineStats(
            running=len(running),
            waiting=len(self._scheduler.waiting) + len(self._submitted),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            kv_tokens_used=sum(s.computed for s in running),
            kv_tokens_capacity=self._cache.slots * self._cache.capacity,
            kv_bytes=self._cache.nbytes,
            step_s=self._step_s,
            forward_s=self._forward_s,
            prefixes=None if self._prefixes is None else self._prefixes.stats,
            is_failing=self._is_failing,
        )

    def _check_prompt(self, ids: list[int], params: SamplingParams) -> None:
        vocab_size = self.model.info.vocab_size
        if not ids:
            raise RequestError("the prompt is empty; it must have at least one token", param="prompt")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise RequestError(f"token ids must lie between 0 and {vocab_size - 1}", param="prompt")
        for token_id in (*params.logit_bias, *params.stop_token_ids):
            if not 0 <= token_id < vocab_size:
                param = "logit_bias" if token_id in params.logit_bias else "stop_token_ids"
                raise RequestError(f"{param}: token id {token_id} is outside the vocabulary", param=param)
        answer = params.max_tokens or max(params.min_tokens, 1)
        wanted = len(ids) + answer
        if wanted > self._max_context:
            raise RequestError(
                f"this model's maximum context length is {self._max_context} tokens, but {wanted} were "
                f"requested ({len(ids)} in the prompt, {answer} for the answer); "
                "shorten the prompt or ask for fewer tokens",
                param="max_tokens" if len(ids) < self._max_context else "messages",
                code="context_length_exceeded",
            )

    def _loop(self) -> None:
        try:
            while self._drain_inbox():
                self._step()
                self.between_steps()
        except BaseException:
            logger.exception("the engine's step loop ended")
            raise
        finally:
            with self._wake:
                self._stopping = True
            for sequence in list(self._known.values()):
                self._end(sequence, FinishReason.ABORT)
            self.between_steps()

    def _drain_inbox(self) -> bool:
        """Process submissions and aborts, waiting for them when idle; False when it is time to stop."""
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
                self._end(sequence, FinishReason.ABORT)
        return not stopping

    def _unfinished(self) -> int:
        """Sequences that hold a slot or wait for one. Those that were aborted or have just finished leave
        before the next one is admitted, so they do not count. Holds the lock."""
        return sum(s.finish_reason is None and not s.is_aborted for s in self._known.values())

    def _step(self) -> None:
        """Admit, schedule, run, report. A failed step fails the sequences that were in it, no others."""
        began = time.perf_counter()
        for sequence in self._scheduler.admit():
            with self._failing_alone(sequence):
                self._begin(sequence)
        chunks = self._scheduler.next_chunks()
        if not chunks:
            return
        logits = None
        with self._failing_alone(*(chunk.sequence for chunk in chunks)):
            batch, counts = assemble(chunks)
            forward_began = time.perf_counter()
            logits = self.model.forward(batch, self._cache)
            forward_s = time.perf_counter() - forward_began
        if logits is None:
            return
        self._is_failing = False
        self._scheduler.observe(chunks, forward_s)
        ready: list[tuple[Sequence, int]] = []
        stop = 0
        for chunk, count in zip(chunks, counts, strict=True):
            rows = range(stop, stop := stop + count)
            with self._failing_alone(chunk.sequence):
                if self._advance(chunk, logits, rows):
                    ready.append((chunk.sequence, rows[-1]))
        self._take_tokens(ready, logits)
        self._steps += 1
        self._forward_s += forward_s
        self._step_s += time.perf_counter() - began

    def _failing_alone(self, *sequences: Sequence) -> _FailingAlone:
        """Exceptions inside fail `sequences` and no others."""
        return _FailingAlone(self._fail, sequences)

    def _fail(self, sequences: Ids[Sequence], error: Exception) -> None:
        if isinstance(error, RequestError):
            reason, text = FinishReason.REFUSED, str(error)
        else:
            self._is_failing = True
            numbers = [sequence.sequence_id for sequence in sequences]
            known = isinstance(error, LociError)
            logger.error("sequences %s failed: %s", numbers, error, exc_info=None if known else error)
            reason, text = (
                FinishReason.ERROR,
                str(error) if known else f"{type(error).__name__} in the engine",
            )
        for sequence in sequences:
            self._end(sequence, reason, text)

    def _begin(self, sequence: Sequence) -> None:
        """Fill the slot of an admitted sequence with the cached prefix of its prompt."""
        assert sequence.slot is not None
        self._cache.reset(sequence.slot)
        if self._prefixes is None or sequence.params.prompt_logprobs is not None:
            return  # log probabilities of the prompt need all of it computed
        prefix = self._prefixes.restore(sequence.slot, sequence.token_ids, sequence.cache_salt)
        sequence.computed = sequence.cached_tokens = sequence.saved = prefix.length
        sequence.divergence = prefix.divergence
        if prefix.logits is not None:
            self._take_tokens([(sequence, 0)], prefix.logits.unsqueeze(0))

    def _advance(self, chunk: Chunk, logits: torch.Tensor, rows: range) -> bool:
        """Record what was computed; True if a token is to be sampled. `rows` of the logits are the
        chunk's."""
        sequence, params = chunk.sequence, chunk.sequence.params
        was_prefilling = sequence.is_prefilling
        first = sequence.computed
        sequence.computed += chunk.length
        if was_prefilling:
            self._prompt_tokens += chunk.length
            if params.prompt_logprobs is not None:
                following = sequence.token_ids[first + 1 : sequence.computed + 1]
                sequence.prompt_logprobs += token_logprobs(
                    logits[rows.start : rows.start + len(following)],
                    torch.tensor(following, dtype=torch.int64),
                    params.prompt_logprobs,
                )
            if sequence.is_prefilling:
                if (
                    sequence.computed == sequence.divergence
                    or sequence.computed >= sequence.saved + SAVE_EVERY
                ):
                    self._save_prefix(sequence)
                return False
            self._save_prefix(sequence, logits[rows[-1]])
        return True

    def _take_tokens(self, ready: list[tuple[Sequence, int]], logits: torch.Tensor) -> None:
        """Sample and report the next token of each sequence, whose logits are a row of `[rows, vocab]`."""
        adjusted = []
        for sequence, row in ready:
            with self._failing_alone(sequence):
                adjusted.append((sequence, row, sequence.sampler.adjusted(logits, row)))
        if not adjusted:
            return
        is_untouched = len(adjusted) == logits.shape[0] and all(new is None for _, _, new in adjusted)
        with self._failing_alone(*(sequence for sequence, _, _ in adjusted)):
            tokens = draw_tokens(
                logits
                if is_untouched
                else torch.stack([logits[row] if new is None else new for _, row, new in adjusted]),
                [sequence.params for sequence, _, _ in adjusted],
                [sequence.sampler.number() for sequence, _, _ in adjusted],
            )
            self.model.expect(
                [
                    (sequence.token_ids, token)
                    for (sequence, _, _), token in zip(adjusted, tokens, strict=True)
                    if token >= 0
                ]
            )
            for (sequence, row, _), token in zip(adjusted, tokens, strict=True):
                with self._failing_alone(sequence):
                    self._take_token(sequence, logits, row, token)

    def _take_token(self, sequence: Sequence, logits: torch.Tensor, row: int, token: int) -> None:
        """Report a token that was drawn from a row of logits `[rows, vocab]`."""
        params = sequence.params
        if token < 0:
            raise LociError("the model produced NaN; the server's log may say why")
        sequence.sampler.remember(token)
        self._generated_tokens += 1
        logprobs: list[TokenLogprob] = []
        if params.logprobs is not None:
            logprobs = token_logprobs(logits[row : row + 1], torch.tensor([token]), params.logprobs)
        sequence.append(token, tuple(logprobs))
        if sequence.finish_reason is not None:
            self._save_prefix(sequence)
            self._forget(sequence)

    def _save_prefix(self, sequence: Sequence, logits: torch.Tensor | None = None) -> None:
        """Cache the current state of a sequence; `logits` `[vocab]` are those after its last token."""
        if self._prefixes is not None and sequence.slot is not None:
            tokens = sequence.token_ids[: sequence.computed]
            self._prefixes.save(sequence.slot, tokens, sequence.cache_salt, logits)
            sequence.saved = sequence.computed

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._forget(sequence)
        if sequence.finish_reason is None:
            sequence.finish(reason, error=error)

    def _forget(self, sequence: Sequence) -> None:
        with self._wake:
            self._known.pop(sequence.sequence_id, None)
            if sequence in self._submitted:
                self._submitted.remove(sequence)
                return
        self._scheduler.release(sequence)


def _nothing() -> None:
    pass


class _FailingAlone:
    """Passes exceptions from a `with` block to `fail`; a generator would do the same at five times the
    cost."""

    __slots__ = ("_fail", "_sequences")

    def __init__(self, fail: Callable[[Ids[Sequence], Exception], None], sequences: Ids[Sequence]) -> None:
        self._fail = fail
        self._sequences = sequences

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._fail(self._sequences, error)
        return True


def _allocate_cache(model: Model, slots: int, capacity: int, prefix_bytes: int) -> KvCache:
    """The cache for `slots` sequences, leaving room for the prefix cache. Raises BudgetError."""
    needed, available = model.cache_bytes(slots, capacity), available_memory_bytes()
    if needed + prefix_bytes > available:
        raise BudgetError(
            f"the KV cache of {slots} sequences of {capacity} tokens needs {needed / 1e9:.1f} GB and the "
            f"prefix cache {prefix_bytes / 1e9:.1f} GB, but only {available / 1e9:.1f} GB of memory is "
            "free; lower --max-model-len, --max-num-seqs or --prefix-cache"
        )
    cache = model.new_cache(slots, capacity)
    cache.shares_logits = True  # a step's tokens are sampled before the next one begins
    return cache
