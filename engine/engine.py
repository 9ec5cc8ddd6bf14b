"""The engine: a step loop in its own thread that turns submitted prompts into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.generation import Output
from engine.model import Model
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

OnOutput = Callable[[Output], None]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics. Counters only grow; durations are seconds."""

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    kv_bytes: int


@dataclass(frozen=True)
class Ticket:
    """A submitted sequence; `Engine.abort` takes it."""

    sequence_id: int


class Engine:
    """Runs sequences on a model. Thread-safe: submit and abort may be called from any thread."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_sequences: int,
        max_context: int,
        prefill_chunk: int = 512,
        max_waiting: int = 256,
    ) -> None:
        raise NotImplementedError

    @property
    def max_context(self) -> int:
        """Tokens a sequence may have, prompt and answer together."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the step loop."""
        raise NotImplementedError

    def stop(self) -> None:
        """Abort what runs and end the step loop; returns when the thread has ended."""
        raise NotImplementedError

    @property
    def is_alive(self) -> bool:
        """True while the step loop runs."""
        raise NotImplementedError

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, on_output: OnOutput) -> Ticket:
        """Queue a sequence; `on_output` is called from the engine's thread with each Output.

        Raises RequestError where the prompt is empty, has ids outside the vocabulary or does not
        leave room for a token (code `context_length_exceeded`), CapacityError where the queue is full.
        """
        raise NotImplementedError

    def abort(self, ticket: Ticket) -> None:
        """End a sequence within one step; its last Output has FinishReason.ABORT. No-op if it ended."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment."""
        raise NotImplementedError
