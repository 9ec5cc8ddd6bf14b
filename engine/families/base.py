"""The family interface: what the engine requires of a model of any architecture.

A family is a folder in `engine/families/` with one `Family` object, and a line in the registry for each of
its model types.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from engine.cache.pages import Pages
from engine.cache.prefixes import Prefixes
from engine.program_report import StepPart
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.part import PartOfCheckpoint, Span
from memory.planner.budget import MemoryBudget
from memory.planner.calibration import StepTimes, is_of_answers
from memory.planner.placement import Placement
from memory.planner.shape import ModelShape
from memory.telemetry import Spans, Telemetry
from quant.errors import BudgetError, ConfigError
from quant.formats.kv_names import KvChoice, KvFormat, resolve
from quant.kernels.cpu.program import Program
from quant.kernels.interface import Kernels

# A context in which a model's products are those of prompts (`Kernels.multiplying`).
PromptProducts = Callable[[], AbstractContextManager[None]]


class Segment(NamedTuple):
    """Consecutive tokens of one sequence in a batch: cache slot, position of the first, how many."""

    slot: int
    start: int
    length: int

    def last(self, count: int) -> Segment:
        """Its last `count` tokens."""
        return self._replace(start=self.start + self.length - count, length=count)


@dataclass(frozen=True)
class Batch:
    """What one step computes: the tokens of several sequences, laid end to end.

    ids        the segments' tokens in order
    segments   one per sequence; together they cover ids
    wanted     the tokens (indices into ids) whose logits are wanted, ascending; None for all
    to_come    tokens of each segment's sequence that follow in later batches before its state is saved or its
               next logits are wanted; None where every state and every token's result is wanted. A model may
               leave out what nothing later looks back on
    states     for a part of a model that is not its first: what the parts before it made of the tokens,
               `[tokens, width]` float32
    """

    ids: Sequence[int]
    segments: tuple[Segment, ...]
    wanted: Sequence[int] | None
    to_come: tuple[int | None, ...] | None = None
    states: torch.Tensor | None = None

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """The tokens, `[tokens]` int64."""
        return torch.tensor(self.ids, dtype=torch.int64)

    def of_all(self) -> Batch:
        """The same with every token's result."""
        return replace(self, wanted=None, to_come=None)

    @cached_property
    def logit_rows(self) -> torch.Tensor:
        """The tokens whose logits are wanted, `[rows]` int64."""
        return torch.tensor(range(len(self.ids)) if self.wanted is None else self.wanted, dtype=torch.int64)

    def is_decode(self, max_rows: int) -> bool:
        """Whether it is at least one and up to so many new tokens: one of each sequence, or some of which all
        logits are wanted, as of drafted ones."""
        is_of_answers = self.wanted is None or len(self.ids) == len(self.segments)
        return 0 < len(self.ids) <= max_rows and is_of_answers

    def places(self) -> tuple[list[int], list[int]]:
        """The slot and the position of each token."""
        if len(self.ids) == len(self.segments):
            return [s.slot for s in self.segments], [s.start for s in self.segments]
        slots = [s.slot for s in self.segments for _ in range(s.length)]
        return slots, [p for s in self.segments for p in range(s.start, s.start + s.length)]

    @classmethod
    def of(cls, parts: Sequence[tuple[int, int, Sequence[int]]], *, all_logits: bool = False) -> Batch:
        """A batch from `(slot, start, ids)` parts; logits of each part's last token, or of all."""
        segments = tuple(Segment(slot, start, len(ids)) for slot, start, ids in parts)
        flat = [i for _, _, ids in parts for i in ids]
        ends = [end - 1 for end in accumulate(s.length for s in segments)]
        return cls(flat, segments, None if all_logits or len(ends) == len(flat) else ends)


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a loaded model that other code needs."""

    family: str
    name: str
    vocab_size: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """A part of a model for reports and plans: its bytes in the checkpoint's own format.

    kind: `dense`, `embedding`, `head`, `shared_experts`, `routed_experts`, `engram` or `router`.
    """

    name: str
    kind: str
    format: str
    nbytes: int
    parameters: int


@dataclass(frozen=True)
class KvRooms:
    """What was kept free for KV when a model was loaded; None where nothing limits it.

    tokens     of all sequences together
    longest    of one sequence
    by_device  bytes for rows, of GPUs
    """

    tokens: int | None = None
    longest: int | None = None
    by_device: Mapping[torch.device, int] = field(default_factory=dict)


class KvCache(ABC):
    """State of up to `slots` sequences of up to `capacity` tokens, at fixed addresses.

    A slot is empty after `reset`; `forward` appends to it. Positions must follow each other: the
    `start` of a segment is the number of tokens that its slot holds. A slot can be rolled back by up to
    `margin` tokens. Rows take memory as their sequence grows.

    pages   of the rows that are appended
    program  the recorded step that decodes with it; None where operations are started one by one, or several
             devices have a part
    step_parts  those of a step recorded on several devices, or on a GPU
    prefixes  what keeps states for later prompts where they are not in this process; None elsewhere
    shares_logits  a forward's results need not be valid any longer than until the next one
    """

    program: Program | None = None
    step_parts: Sequence[StepPart] = ()
    shares_logits: bool = False
    prefixes: Prefixes | None = None

    def __init__(self, slots: int, capacity: int, *, margin: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self.margin = margin
        self.pages = Pages(slots)
        self._lengths = [0] * slots
        self._shortest = [0] * slots

    def reset(self, slot: int) -> None:
        """Clear `slot`."""
        self.resume(slot, 0, 0)

    def release(self, slot: int) -> None:
        """Clear `slot`, and give back its pages."""
        self.reset(slot)
        self.pages.release(slot)

    def length(self, slot: int) -> int:
        """Tokens that `slot` holds."""
        return self._lengths[slot]

    def admit(self, segment: Segment) -> None:
        """Check that `segment` continues its slot and fits, and take the pages that it needs. Raises
        BudgetError where it does not fit."""
        held = self._lengths[segment.slot]
        if segment.start != held:
            raise ValueError(
                f"slot {segment.slot} holds {held} tokens, but the segment starts at {segment.start}"
            )
        needed = segment.start + segment.length
        if needed > self.capacity:
            raise BudgetError(f"{needed} tokens do not fit in a cache of {self.capacity} tokens per sequence")
        self.pages.hold(segment.slot, needed)

    def advance(self, segment: Segment) -> None:
        """Count the segment's tokens as held; called when every layer has stored them."""
        self._lengths[segment.slot] += segment.length
        shortest = self._lengths[segment.slot] - self.margin
        self._shortest[segment.slot] = max(self._shortest[segment.slot], shortest)

    def shortest(self, slot: int) -> int:
        """The shortest length to which the sequence in `slot` can be rolled back."""
        return self._shortest[slot]

    def resume(self, slot: int, length: int, shortest: int) -> None:
        """Set the slot's length to `length`, after `appended` and `recent` were filled; the state can be
        rolled back to `shortest`."""
        self._lengths[slot], self._shortest[slot] = length, shortest

    @abstractmethod
    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        """Append-only state: (tokens per row, view `[rows, ...]`) for each part.

        A row is complete once the slot holds all its tokens.
        """

    @abstractmethod
    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        """Views of the rest of the state of a slot of `length` tokens, which later tokens overwrite."""

    @abstractmethod
    def bytes_at(self, tokens: int) -> int:
        """Bytes with so many tokens in every slot, program included. Of none, those that do not grow."""

    @property
    def nbytes(self) -> int:
        """Bytes that it may take: what does not grow, and the pages' budgets. Without budgets, those of all
        slots at the capacity."""
        budget = self.pages.budget_bytes
        return self.bytes_at(self.capacity) if budget is None else self.bytes_at(0) + budget


class Model(ABC):
    """A loaded model: weights in place, ready to run batches."""

    info: ModelInfo
    kv_format: KvFormat = "float32"  # of its caches
    times = StepTimes()  # of its forwards
    of_answers: Spans | None = None  # told of steps of answers alone, for whoever compares them with a plan
    keeps_whole_states = True  # also of sequences whose tokens are still to come

    def close(self) -> None:  # noqa: B027 - most models have nothing to close
        """Release threads and files; the model cannot run afterwards."""

    @property
    def held_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes of weights allocated, by tier and part: `dense` (what every token reads, and the embedding),
        `experts`, `engram`."""
        return {}

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes of weights allocated in each tier."""
        return {tier: sum(parts.values()) for tier, parts in self.held_bytes.items()}

    @property
    def placement(self) -> Placement | None:
        """What it was loaded by; None for a model that is not placed."""
        return None

    def expert_tiers(self) -> list[list[str]]:
        """The tier that holds each routed expert, by layer and expert; empty where experts have no tiers."""
        return []

    def expert_uses(self) -> list[list[float]]:
        """How often each routed expert was used, by layer and expert; empty where nobody counts."""
        return []

    @property
    def telemetry(self) -> Telemetry | None:
        """Counters of hits, transfers and stalls; None if nothing moves between tiers."""
        return None

    @abstractmethod
    def new_cache(self, slots: int, capacity: int) -> KvCache:
        """A cache for `slots` sequences of `capacity` tokens."""

    @abstractmethod
    def cache_bytes(self, slots: int, capacity: int) -> int:
        """Bytes that `new_cache` could take in host memory, were all slots full."""

    def kv_rooms(self, slots: int) -> KvRooms:
        """What was kept free for the KV of so many sequences."""
        return KvRooms()

    def expect(self, drawn: Sequence[tuple[Sequence[int], int]]) -> None:  # noqa: B027 - optional
        """Called as soon as tokens are sampled, each with those before it, to prefetch what they need."""

    def capture(self) -> bool:
        """From now on keep what a drafter of this model reads of every token beside the logits: the last
        hidden state, say. Called before `new_cache`. False where there is nothing of that kind; nothing is
        kept then, and nothing is where nobody asked."""
        return False

    def captured(self) -> list[torch.Tensor]:
        """Of the last forward, where `capture` was asked for: `[n, width]` float32 of each segment's last n
        tokens; all of them, but for what was left out amid a prompt (`Batch.to_come`). Valid until the next
        forward."""
        return []

    def drop_captured(self) -> None:  # noqa: B027 - optional
        """Nobody asks for that any more: of a long prompt it is large."""

    def forward(self, batch: Batch, cache: KvCache, trace: Trace | None = None) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[rows, vocab_size]` float32; the cache grows by the batch. Of a part
        that is not a model's last, the states of all tokens, `[tokens, width]` float32.

        The answer for a sequence does not depend on what else is in the batch, nor on how its
        tokens were cut into chunks.
        """
        for segment in batch.segments:
            cache.admit(segment)
        parts = [(segment.start, segment.length) for segment in batch.segments]
        count = len(batch.ids) if batch.wanted is None else len(batch.wanted)
        if self.of_answers is not None:
            self.of_answers.goes_on(is_of_answers(parts, count))
        begun = time.perf_counter()
        logits = self._step(batch, cache, trace)
        self.times = self.times.plus(parts, count, time.perf_counter() - begun)
        for segment in batch.segments:
            cache.advance(segment)
        return logits

    @abstractmethod
    def _step(self, batch: Batch, cache: KvCache, trace: Trace | None) -> torch.Tensor:
        """What `forward` returns, of segments that the cache has admitted; every layer stores them in it."""


class Family(ABC):
    """An architecture: how to recognise, describe, check and load its checkpoints."""

    name: str

    @abstractmethod
    def describe(self, checkpoint: Checkpoint) -> tuple[ModelInfo, list[Component]]:
        """What the model is and what its parts weigh, from config and headers alone.

        Raises ConfigError where the config is not one this family can run.
        """

    @abstractmethod
    def check(self, checkpoint: Checkpoint) -> None:
        """Compare the checkpoint with what this family reads, from config and headers alone.

        Raises CheckpointError listing everything that is wrong.
        """

    def kv_formats(self, checkpoint: Checkpoint) -> tuple[KvFormat, ...]:
        """The formats that a cache of this model can be kept in, the default first."""
        return ("float32",)

    def kv_format(self, checkpoint: Checkpoint, asked: KvChoice) -> KvFormat:
        """The one asked for. Raises ConfigError for one that this model cannot have."""
        return resolve(asked, self.kv_formats(checkpoint), checkpoint.name)

    def shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        """The checkpoint's shape for the planner, from its config and headers, with KV in this format.

        Raises ConfigError for a config that the family cannot run, and if it cannot be planned yet.
        """
        raise ConfigError(f"{checkpoint.path}: checkpoints of the {self.name} family cannot be planned yet")

    def loaded_shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        """The same with the bytes that it takes in memory once it is loaded, which placements are made of."""
        return self.shape(checkpoint, kv_format)

    def config_shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        """The planner's shape of what a config alone says: a checkpoint without tensors, its weights as
        released. Raises ConfigError for a config that the family cannot run, or if it needs headers."""
        raise ConfigError(
            f"{checkpoint.path}: the {self.name} family is planned from a checkpoint or by name, "
            "not by config"
        )

    def reencoded(self, checkpoint: Checkpoint, experts: str) -> Checkpoint:
        """The checkpoint with its routed experts in another format, `mxfp4`, `nf4` or `int4`.

        Raises ConfigError where that makes no sense, or where this family cannot do it.
        """
        raise ConfigError(
            f"--experts {experts}: experts of the {self.name} family are not encoded while loading; "
            "`loci quantize` converts the checkpoint, or leave --experts out"
        )

    def cuts(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """The layers before which a model may be cut into parts for several machines: nothing but a token's
        state passes there. None where the family cannot be cut."""
        return ()

    def part(self, checkpoint: Checkpoint, span: Span) -> PartOfCheckpoint:
        """Some layers of a checkpoint, cut at `cuts`, to be loaded as a model."""
        raise ConfigError(f"{checkpoint.path}: the {self.name} family runs on one machine only")

    @abstractmethod
    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> Model:
        """The model, its weights read within `budget`, still packed.

        Raises what `check` does, before anything large is read, and BudgetError where what every token
        needs does not fit.
        """


@dataclass
class Trace:
    """Collects intermediate values of a forward for tests and profiles, where one is passed in.

    `values["router_ids.3"]` is a list with one tensor per forward, in order.
    """

    values: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Append `value` under `name`."""
        self.values.setdefault(name, []).append(value)


class _NoTrace(Trace):
    def add(self, name: str, value: Any) -> None:
        """Discard values: those of all layers together are many times what a forward needs."""


NO_TRACE = _NoTrace()
