"""A step of the engine: schedule chunks, run the model on them, sample and report.

Everything here is called from the engine's thread. What fails for one sequence fails no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids

import torch

from engine.assemble import assemble
from engine.cache.aside import Aside
from engine.cache.pages import PoolShortError
from engine.cache.prefixes import Prefixes
from engine.drafts.drafting import Drafting
from engine.drafts.verify import Ready, Verifier
from engine.families.base import KvCache, Model, PromptProducts
from engine.output import FinishReason
from engine.sampling.sampler import token_logprobs
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Sequence
from quant.errors import BudgetError, LociError, RequestError

logger = logging.getLogger("loci.engine")

# While a long prompt is computed, its state is saved every so many tokens, for prompts that share only its
# beginning; not of a model that leaves out, amid a prompt, what only its end needs.
SAVE_EVERY = 2048
# Tokens for which a sequence that was put aside finds pages when it goes on, or it would soon be put aside
# again.
RETURN_ROOM = 512


class Steps:
    """Runs the sequences of a scheduler, step by step.

    forget  takes a sequence that has ended off the books; False if it was never scheduled
    drafting  adds drafts to steps
    prompt_products  how prompts are multiplied, where not exactly
    count, prompt_tokens, generated_tokens, step_s, forward_s  see `EngineStats`
    """

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        prefixes: Prefixes | None,
        aside: Aside,
        scheduler: Scheduler,
        forget: Callable[[Sequence], bool],
        drafting: Drafting,
        prompt_products: PromptProducts | None = None,
    ) -> None:
        self.prefixes = prefixes
        self.drafting = drafting
        self.aside = aside
        self.prompt_tokens = 0
        self.count = 0
        self.step_s = self.forward_s = 0.0
        self.is_failing = False
        self._model = model
        self._cache = cache
        self._scheduler = scheduler
        self._forget = forget
        self._prompt_products = prompt_products
        self._verifier = Verifier(self._expect, self._fail)

    @property
    def generated_tokens(self) -> int:
        """See `EngineStats`."""
        return self._verifier.generated_tokens

    def run(self) -> None:
        """Admit, schedule, run, report. A failed step fails the sequences that were in it, no others."""
        began = time.perf_counter()
        for sequence in self._scheduler.admit(self._take_first_pages):
            try:
                self._begin(sequence)
            except Exception as error:
                self._fail([sequence], error)
        chunks = self._with_pages(self._scheduler.next_chunks())
        if not chunks:
            return
        chunks.sort(key=lambda chunk: chunk.is_of_prompt)
        try:
            chunks = self._with_room(self.drafting.propose(chunks))
            forward_began = time.perf_counter()
            logits, counts, captures = self._forward(chunks)
            forward_s = time.perf_counter() - forward_began
        except Exception as error:
            self._fail([chunk.sequence for chunk in chunks], error)
            return
        self.is_failing = False
        self._scheduler.observe(chunks, forward_s)
        starts = [chunk.sequence.computed for chunk in chunks]
        of_answers = not any(chunk.sequence.is_prefilling for chunk in chunks)
        ready: list[Ready] = []
        stop = 0
        for chunk, count in zip(chunks, counts, strict=True):
            rows = range(stop, stop := stop + count)
            try:
                if self._advance(chunk, logits, rows):
                    row = rows[-1] - len(chunk.drafted)
                    ready.append(Ready(chunk.sequence, row, chunk.drafted, chunk.is_predicted))
            except Exception as error:
                self._fail([chunk.sequence], error)
        lengths = [len(chunk.sequence.token_ids) for chunk in chunks]
        accepted = self._verifier.take(ready, logits)
        self._roll_back(chunks)
        self.drafting.observe(chunks, starts, captures)
        if of_answers and len(ready) == len(chunks):
            known = zip(chunks, lengths, strict=True)
            brought = [len(chunk.sequence.token_ids) - length - 1 for chunk, length in known]
            self.drafting.learn(chunks, accepted, brought, time.perf_counter() - began)
        self._keep_states(ready, logits)
        self.count += 1
        self.forward_s += forward_s
        self.step_s += time.perf_counter() - began

    def _expect(self, ahead: Ids[tuple[Ids[int], int]]) -> None:
        self._model.expect(ahead)

    def _roll_back(self, chunks: list[Chunk]) -> None:
        """Take back what was computed behind the tokens that were drawn."""
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.drafted and sequence.slot is not None:
                known = len(sequence.token_ids) - 1
                if known < sequence.computed:
                    try:
                        sequence.computed = self.drafting.roll_back(sequence, known)
                    except Exception as error:
                        self._fail([sequence], error)

    def _forward(self, chunks: list[Chunk]) -> tuple[torch.Tensor, list[int], list[torch.Tensor | None]]:
        """Logits of these chunks, those of answers first, `[rows, vocab]`, how many rows each has, and what
        drafters want to know of each.

        Where prompts have products of their own, they are computed by themselves, so that an answer's tokens
        are always exact, also of one that was put aside and is computed again.
        """
        answers = sum(not chunk.is_of_prompt for chunk in chunks)
        if self._prompt_products is None or answers == len(chunks):
            batch, counts = assemble(chunks)
            return self._model.forward(batch, self._cache), counts, self.drafting.captured()
        batch, counts = assemble(chunks[answers:])
        with self._prompt_products():
            logits = self._model.forward(batch, self._cache)
        captures = self.drafting.captured()
        if not answers:
            return logits, counts, captures
        logits = logits.clone()  # of a recorded step, they need not outlast the next one
        captures = [None if kept is None else kept.clone() for kept in captures]
        batch, of_answers = assemble(chunks[:answers])
        logits = torch.cat([self._model.forward(batch, self._cache), logits])
        return logits, of_answers + counts, self.drafting.captured() + captures

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Take a sequence out, and report its end if that was not reported."""
        self._release(sequence)
        if sequence.finish_reason is None:
            sequence.finish(reason, error=error)

    def _fail(self, sequences: Ids[Sequence], error: Exception) -> None:
        if isinstance(error, RequestError):
            reason, text = FinishReason.REFUSED, str(error)
        else:
            self.is_failing = True
            numbers = [sequence.sequence_id for sequence in sequences]
            known = isinstance(error, LociError)
            logger.error("sequences %s failed: %s", numbers, error, exc_info=None if known else error)
            reason, text = (
                FinishReason.ERROR,
                str(error) if known else f"{type(error).__name__} in the engine",
            )
        for sequence in sequences:
            self.end(sequence, reason, text)

    # ------------------------------------------------------------------------------- the pool of pages

    def _take_first_pages(self, sequence: Sequence, slot: int) -> bool:
        """Take pages for a waiting sequence's tokens, and for some more if it was put aside: it would not get
        far otherwise. False where there are too few."""
        tokens = len(sequence.token_ids)
        if sequence.was_aside:
            tokens += min(RETURN_ROOM, sequence.max_tokens - sequence.generated)
        try:
            self._cache.pages.hold(slot, tokens)
        except PoolShortError:
            return False
        except Exception:  # a device has less memory than was planned, or worse: `_begin` tries it again
            return True
        return True

    def _with_pages(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks whose sequences have pages for them, the oldest first.

        Where the pool is short, the youngest sequence waits; where that is not enough, it is put aside.
        """
        pages, waiting = self._cache.pages, []
        for chunk in sorted(chunks, key=lambda chunk: chunk.sequence.sequence_id):
            while chunk.sequence.slot is not None:
                try:
                    pages.hold(chunk.sequence.slot, chunk.sequence.computed + chunk.length)
                    break
                except PoolShortError as error:
                    youngest = max(self._scheduler.running, key=lambda sequence: sequence.sequence_id)
                    if youngest is not chunk.sequence:
                        self._put_aside(youngest)
                    elif len(self._scheduler.running) == 1:
                        self._fail([youngest], error)
                    else:
                        waiting.append(chunk)
                        break
                except Exception as error:  # a device has less memory than was planned, or worse
                    self._fail([chunk.sequence], error)
        return [chunk for chunk in chunks if chunk.sequence.slot is not None and chunk not in waiting]

    def _with_room(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks, without drafts where the pool has no room for these: nobody waits for them."""
        found = []
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.drafted:
                assert sequence.slot is not None
                try:
                    self._cache.pages.hold(sequence.slot, sequence.computed + chunk.length)
                except BudgetError:  # PoolShortError, or the device has less memory than was planned
                    found.append(chunk.without_drafts())
                    continue
            found.append(chunk)
        return found

    def _put_aside(self, sequence: Sequence) -> None:
        """Take a sequence's slot and pages; it goes on when there is room, unless this fails."""
        assert sequence.slot is not None
        slot = sequence.slot
        try:
            self.drafting.close(sequence)
            sequence.put_aside(self.aside.put(slot) if self._cache.length(slot) else None)
            self._cache.release(slot)
        except Exception as error:
            self._fail([sequence], error)
        else:
            self._scheduler.put_aside(sequence)

    def _bring_back(self, sequence: Sequence) -> bool:
        """Fill the slot of an admitted sequence with what was put aside of it, if that is there."""
        assert sequence.slot is not None
        kept, sequence.kept = sequence.kept, None
        if kept is None or not self.aside.bring_back(sequence.slot, kept):
            return False
        sequence.computed = kept.length
        return True

    def _begin(self, sequence: Sequence) -> None:
        """Fill the slot of an admitted sequence with its own state, or the cached prefix of its prompt."""
        assert sequence.slot is not None
        self._cache.pages.hold(sequence.slot, len(sequence.token_ids))  # where a device refused them
        self._cache.reset(sequence.slot)
        self.drafting.open(sequence)
        if self._bring_back(sequence):
            return
        lacks_logprobs = 0 < len(sequence.prompt_logprobs) < sequence.prompt_length
        if self.prefixes is None or lacks_logprobs:
            return  # log probabilities of the prompt need all of it computed
        prefix = self.prefixes.restore(sequence.slot, sequence.token_ids, sequence.cache_salt)
        sequence.computed = sequence.saved = prefix.length
        if not sequence.has_computed:  # or some of what is cached now is its own
            sequence.cached_tokens = prefix.length
        sequence.stops = prefix.stops
        if prefix.logits is not None:
            logits, ready = prefix.logits.unsqueeze(0), [Ready(sequence, 0)]
            self._verifier.take(ready, logits)
            self._keep_states(ready, logits)

    def _advance(self, chunk: Chunk, logits: torch.Tensor, rows: range) -> bool:
        """Record what was computed; True if a token is to be sampled. `rows` of the logits are the
        chunk's."""
        sequence = chunk.sequence
        first = sequence.computed
        was_prefilling = sequence.is_prefilling
        sequence.computed = first + chunk.length
        if not was_prefilling:
            return True
        self.prompt_tokens += chunk.length
        wanted, known = sequence.params.prompt_logprobs, len(sequence.prompt_logprobs)
        following = sequence.token_ids[known : min(sequence.computed + 1, sequence.prompt_length)]
        if wanted is not None and following:
            begin = rows.start + known - first - 1
            sequence.prompt_logprobs += token_logprobs(
                logits[begin : begin + len(following)], following, wanted
            )
        if sequence.is_prefilling:
            is_due = self._model.keeps_whole_states and sequence.computed >= sequence.saved + SAVE_EVERY
            if is_due or sequence.computed in sequence.stops:
                self._save_prefix(sequence)
            return False
        return True

    def _keep_states(self, ready: list[Ready], logits: torch.Tensor) -> None:
        """Save the states after prompts that are computed and after answers that have ended, and release the
        latter. Their tokens are on their way by then: a long state takes longer to copy than a step."""
        for sequence, row, *_ in ready:
            if sequence.slot is None:  # it failed
                continue
            try:
                if sequence.saved < sequence.computed == sequence.prompt_length:
                    self._save_prefix(sequence, logits[row])
                if sequence.finish_reason is not None:
                    self._save_prefix(sequence)
                    self._release(sequence)
            except Exception as error:
                self._fail([sequence], error)

    def _save_prefix(self, sequence: Sequence, logits: torch.Tensor | None = None) -> None:
        """Cache the current state of a sequence; `logits` `[vocab]` are those after its last token."""
        if self.prefixes is not None and sequence.slot is not None:
            tokens = sequence.token_ids[: sequence.computed]
            self.prefixes.save(sequence.slot, tokens, sequence.cache_salt, logits)
            sequence.saved = sequence.computed

    def _release(self, sequence: Sequence) -> None:
        """Give back what a sequence has. What cannot be given back is its slot's next sequence's."""
        if not self._forget(sequence):
            return
        try:
            if sequence.kept is not None:
                self.aside.drop(sequence.kept)
            self.drafting.close(sequence)
            if sequence.slot is not None:
                self._cache.release(sequence.slot)
        except Exception:
            logger.exception("memory of sequence %d was not given back", sequence.sequence_id)
        self._scheduler.release(sequence)
