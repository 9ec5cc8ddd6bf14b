"""What a server needs of an engine, be it in this process or with replicas elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.engine import EngineStats, PromptProgress, Submission
from engine.grammar.constraint import GrammarCompiler
from engine.sampling.params import SamplingParams
from engine.sequence import OnOutput


class Answering(Protocol):
    """Token ids into token ids; see `engine.engine.Engine`."""

    grammars: GrammarCompiler
    between_steps: Callable[[], None]

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and answer together."""
        ...

    @property
    def max_sequences(self) -> int:
        """Sequences that are computed at once."""
        ...

    @property
    def is_alive(self) -> bool:
        """True while sequences are computed."""
        ...

    @property
    def is_ready(self) -> bool:
        """True while a sequence that is submitted now can be computed."""
        ...

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: OnOutput,
        *,
        cache_salt: str = "",
        prediction: Sequence[int] = (),
    ) -> Submission:
        """Queue a sequence. Raises RequestError and CapacityError."""
        ...

    def abort(self, ticket: Submission) -> None:
        """End a sequence soon; no-op if it has ended."""
        ...

    def foresee(self, cache_salt: str, beginning: list[int]) -> None:
        """A prompt that begins so will be submitted soon."""
        ...

    def prompt_progress(self, ticket: Submission) -> PromptProgress | None:
        """How much of a sequence's prompt has been computed; None once it is done, or the sequence ended."""
        ...

    def stats(self) -> EngineStats:
        """Current counters and gauges."""
        ...

    def stop(self) -> None:
        """Abort running sequences and end."""
        ...
