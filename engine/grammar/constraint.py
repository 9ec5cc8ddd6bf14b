"""Keeping answers to a grammar: which tokens may come next, worked out beside the model's computation.

`llguidance` reads grammars and tells the tokens that may follow. A grammar is compiled once and kept;
each sequence follows a copy. The mask for the next token depends on nothing but the tokens so far, so
it is computed in a thread while the model runs, and is usually there when the logits are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance
import numpy as np
import torch

from engine.grammar.lark import MAX_BYTES, Grammar
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import CapacityError, RequestError
from quant.kernels.cpu.draws import native_draws

KEPT = 32  # compiled grammars, each of some kB; hostile ones some dozen MB
MAX_COMPILING = 16  # at once, most of them waiting for a thread
MASK_THREADS = 2
COMPILE_THREADS = 2

# The library counts its work and gives up at these limits: a hostile grammar costs seconds, not hours.
LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000, max_lexer_states=20_000, step_max_items=20_000, verbose_errors=False
)

# What the library tells programs that call it, and what a client can do.
ADVICE = {
    ". Enable 'coerce_one_of' option to approximate oneOf with anyOf": (
        " where a value may match several alternatives; write anyOf"
    ),
    "either increase limits.initial_lexer_fuel or disable limits.precompute_large_lexemes": (
        "make the grammar simpler"
    ),
    "Default retriever does not fetch resources": (
        "the server does not fetch resources; put it into the schema, under $defs"
    ),
}


class GrammarCompiler:
    """Compiles grammars for one vocabulary and hands out constraints. Thread-safe.

    end_token_ids   tokens that end an answer; they may come only where the grammar is fulfilled
    vocab_size      length of a row of logits; ids that the tokenizer lacks are never allowed
    """

    def __init__(self, tokenizer: Tokenizer, end_token_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._ends = [i for i in end_token_ids if i < tokenizer.size]
        self._vocab_size = vocab_size
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._compiling = 0
        self._compilers = ThreadPoolExecutor(COMPILE_THREADS, "loci-grammar")
        self._masks = ThreadPoolExecutor(MASK_THREADS, "loci-mask")

    def compile(self, grammar: Grammar) -> Future[object]:
        """Compile in a thread, so that `start` finds it done.

        The future raises RequestError naming the field at fault. Raises CapacityError where too many
        are being compiled.
        """
        with self._lock:
            if self._compiling >= MAX_COMPILING:
                raise CapacityError("too many grammars are being compiled; try again later")
            self._compiling += 1
        future: Future[object] = self._compilers.submit(self._matcher, grammar)
        future.add_done_callback(self._count_down)
        return future

    def start(self, grammar: Grammar) -> Constraint:
        """A constraint for a new answer; compiles where that was not done before.

        Raises RequestError naming the field at fault.
        """
        return Constraint(self._matcher(grammar).deep_copy(), self._masks, self._vocab_size)

    def close(self) -> None:
        """End the threads; what they still have to do is dropped."""
        for pool in (self._compilers, self._masks):
            pool.shutdown(wait=False, cancel_futures=True)

    def _count_down(self, _: Future[object]) -> None:
        with self._lock:
            self._compiling -= 1

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        with self._lock:
            kept = self._compiled.get(grammar.text)
            if kept is not None:
                self._compiled.move_to_end(grammar.text)
                return kept
        matcher = self._compiled_now(grammar)
        with self._lock:
            self._compiled[grammar.text] = matcher
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _compiled_now(self, grammar: Grammar) -> llguidance.LLMatcher:
        _check_size(grammar)
        matcher, error = self._try(grammar.text)
        if not error:
            return matcher
        for field, part in grammar.parts:
            if reason := self._try(part)[1]:
                raise RequestError(f"{field}: {reason}", param=field, code="invalid_grammar")
        raise RequestError(f"invalid grammar: {error}", code="invalid_grammar")

    def _try(self, text: str) -> tuple[llguidance.LLMatcher, str]:
        """A matcher that has computed its first mask, and why it is of no use, if it is not."""
        matcher = llguidance.LLMatcher(self._known_vocabulary(), text, log_level=0, limits=LIMITS)
        can_begin = not matcher.is_error() and any(matcher.compute_bitmask())
        return matcher, "" if can_begin and not matcher.is_error() else _reason(matcher)

    def _known_vocabulary(self) -> llguidance.LLTokenizer:
        if not self._ends:
            raise RequestError(
                "this model has no end-of-sequence token, so its answers cannot be constrained"
            )
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = vocabulary_of(self._tokenizer, self._ends)
            return self._vocabulary


class Constraint:
    """What one answer may go on with. The first mask is under way from the beginning."""

    def __init__(self, matcher: llguidance.LLMatcher, threads: ThreadPoolExecutor, vocab_size: int) -> None:
        self._matcher = matcher
        self._threads = threads
        self._vocab_size = vocab_size
        self._allowed = threads.submit(self._compute)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[vocab_size]` with those of forbidden tokens at minus infinity.

        Raises RequestError where no token is left, or the grammar became too ambiguous to follow.
        """
        allowed, native = self._allowed.result(), native_draws()
        if native is not None and logits.dtype == torch.float32 and logits.is_contiguous():
            return native.masked(logits, allowed)
        known = min(self._vocab_size, 8 * len(allowed))
        bits = np.zeros(self._vocab_size, dtype=bool)
        bits[:known] = np.unpackbits(allowed, count=known, bitorder="little")
        return logits.masked_fill(~torch.from_numpy(bits), -torch.inf)

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen and begin with the next mask."""
        self._allowed = self._threads.submit(self._compute, token_id)

    def _compute(self, token_id: int | None = None) -> np.ndarray:
        """The tokens that may follow behind `token_id`, a bit for each, uint8 `[vocab_size / 8]` or fewer."""
        if token_id is not None:
            self._matcher.consume_token(token_id)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: self._vocab_size // 8 + 1]
        if self._vocab_size < 8 * len(bits):
            bits = bits.copy()
            bits[-1] &= (1 << self._vocab_size % 8) - 1
        if self._matcher.is_error() or not bits.any():
            reason = _reason(self._matcher)
            raise RequestError(
                f"no token can continue the answer under its grammar: {reason}", code="invalid_grammar"
            )
        return bits


def vocabulary_of(tokenizer: Tokenizer, end_token_ids: Sequence[int]) -> llguidance.LLTokenizer:
    """The bytes of every token, and which tokens end an answer.

    Added tokens (special ones, tags) are no text: a grammar admits one only where it names its id.
    """
    wrapper = llguidance.TokenizerWrapper(_Source(tokenizer, end_token_ids[0]))
    return llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.size, eos_token=list(end_token_ids))


class _Source:
    """The attributes that `TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
        self.special_token_ids = list(tokenizer.added_tokens.values())

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode_inside(plain)


def _check_size(grammar: Grammar) -> None:
    size = len(grammar.text.encode())
    if size > MAX_BYTES:
        field = max(grammar.parts, key=lambda part: len(part[1]))[0] if grammar.parts else None
        text = f"the grammar has {size} bytes, more than the limit of {MAX_BYTES}; make it smaller"
        raise RequestError(text, param=field, code="invalid_grammar")


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Why nothing can follow: the library's complaint without its excerpt of the grammar, which is ours as
    often as the client's."""
    error = matcher.get_error()
    if not error or error.startswith("NoExtension"):
        return "no token of the vocabulary matches what must come next"
    lines = [line.strip() for line in error.splitlines()]
    reason = "; ".join(line for line in lines if line and "|" not in line and line[0] not in "^<")
    for advice, ours in ADVICE.items():
        reason = reason.replace(advice, ours)
    return reason[:500]
