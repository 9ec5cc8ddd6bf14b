"""Looks at the clock around the functions that a step calls, without a trace of it in those functions.

While a `Watch` is on, they are replaced by ones that note the time before and after.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine import steps
from engine.cache.sparse import SparseCache
from engine.drafts import verify
from engine.drafts.drafting import Drafting
from engine.engine import Engine
from engine.grammar.constraint import Constraint
from engine.layers.engram_lookup import EngramLookup
from engine.sampling.sampler import Sampler
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.tokenizer.detokenizer import Detokenizer
from memory.experts.store import ExpertStore
from quant.kernels.cpu import library

# Where time goes that no function below takes: the step loop itself, its locks and its bookkeeping.
LOOP = "loop"
# Calls of the library that are no part of a model's computation; every other is a kernel, a part by its name.
AROUND = {
    "loci_rows_wait": "waiting",
    "loci_draw": "sampling",
    "loci_mask": "masks",
    "loci_log_probabilities": "log probabilities",
}
KERNELS = tuple(name for name in library.SIGNATURES if name not in AROUND)


@dataclass
class Watch:
    """Seconds and calls by part, of one thread; each moment belongs to one part alone.

    A function that is called from another one interrupts it.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _thread: int | None = None
    _part: str = LOOP
    _since: float = 0.0

    def reset(self) -> None:
        """Start again, and watch the thread that calls this."""
        self._thread = threading.get_ident()
        self.seconds.clear()
        self.calls.clear()
        self._since = time.perf_counter()

    def switch(self, part: str) -> str:
        """From now on time belongs to `part`; the part it belonged to until now."""
        now = time.perf_counter()
        before, self._part = self._part, part
        self.seconds[before] += now - self._since
        self._since = now
        return before

    @contextmanager
    def on(self, engine: Engine) -> Iterator[None]:
        """Watch an engine's steps, and every call of a compiled kernel."""
        compiled = library.load()
        places: list[tuple[object, str, str]] = [
            (Scheduler, "admit", "scheduling"),
            (Scheduler, "next_chunks", "scheduling"),
            (Scheduler, "observe", "scheduling"),
            (steps, "assemble", "assembling"),
            (engine.model, "forward", "forward"),
            (Sampler, "adjusted", "sampling"),
            (Constraint, "mask", "masks"),
            (Constraint, "advance", "masks"),
            (Sampler, "number", "sampling"),
            (Sampler, "remember", "sampling"),
            (verify, "draw_tokens", "sampling"),
            (steps, "token_logprobs", "log probabilities"),
            (verify, "token_logprobs", "log probabilities"),
            (Drafting, "propose", "drafting"),
            (Drafting, "observe", "drafting"),
            (Drafting, "learn", "drafting"),
            (engine.model, "expect", "prefetching"),
            (EngramLookup, "begin", "prefetching"),
            (SparseCache, "extend_history", "prefetching"),
            (ExpertStore, "used_at_hand", "policy"),
            (Detokenizer, "push", "detokenising"),
            (Sequence, "append", "output"),
            *((compiled, name, AROUND.get(name, name)) for name in library.SIGNATURES),
        ]
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(_replaced(owner, name, self._timed(part, getattr(owner, name))))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*arguments, **named)
            before = self.switch(part)
            try:
                return function(*arguments, **named)
            finally:
                self.switch(before)
                self.calls[part] += 1

        return call


@contextmanager
def _replaced(owner: object, name: str, by: object) -> Iterator[None]:
    """`owner.name` is `by`, and afterwards what it was."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
