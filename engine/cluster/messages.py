"""What passes between the engine and the parts of a model: plain values that any transport can carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cache.pages import RowsSize
from engine.families.base import Batch, ModelInfo, Segment
from quant.errors import CapacityError


class StageLostError(CapacityError):
    """A part of the model is gone, and what it held of sequences with it; it may be back soon."""


@dataclass(frozen=True)
class Resume:
    """A slot holds `length` tokens from now on: 0 clears it."""

    slot: int
    length: int


@dataclass(frozen=True)
class Release:
    """A slot's sequence has ended: it is cleared, and its pages are free."""

    slot: int


@dataclass(frozen=True)
class Save:
    """Keep a slot's state for later prompts; `tokens` `[n]` int32 are what it holds.

    with_logits  those after the last token too, which the last part has just computed
    """

    slot: int
    tokens: NDArray[np.int32]
    salt: str
    with_logits: bool


@dataclass(frozen=True)
class Trim:
    """A slot has pages for so many tokens at most: the engine counts them, for all parts alike."""

    slot: int
    tokens: int


Order = Resume | Release | Save | Trim


@dataclass(frozen=True)
class Work:
    """Tokens to compute, after some orders have been followed. `session` is the part's, as it was opened.

    batch  None for orders alone
    """

    session: str
    orders: tuple[Order, ...]
    ids: tuple[int, ...] = ()
    segments: tuple[tuple[int, int, int], ...] = ()
    wanted: tuple[int, ...] | None = None
    to_come: tuple[int | None, ...] | None = None

    def batch(self) -> Batch:
        """The tokens as models take them."""
        segments = tuple(Segment(*segment) for segment in self.segments)
        return Batch(list(self.ids), segments, self.wanted, self.to_come)


@dataclass(frozen=True)
class Handed:
    """What a part makes of a batch: states `[tokens, width]` for the next, or logits `[rows, vocab]`.

    seconds  that each part so far has computed
    nbytes   that each of them has handed on
    """

    values: NDArray[np.float32]
    seconds: tuple[float, ...] = ()
    nbytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Restored:
    """A slot after a prefix was restored: tokens that it holds, the shortest length it can go back to, where
    the prefill is to pause, and `[vocab]` logits after the last token where these are known."""

    length: int
    shortest: int
    stops: tuple[int, ...]
    logits: NDArray[np.float32] | None


@dataclass(frozen=True)
class PlannedKv:
    """A plan's rows in host memory, and of how many tokens."""

    nbytes: int
    tokens: int


@dataclass(frozen=True)
class PartInfo:
    """A loaded part: what the engine must know of it.

    tokens, longest  of its KV: of all sequences, and of one; None where nothing limits them
    kv_bytes         for rows, by device
    held_bytes       of weights, by tier and part
    """

    info: ModelInfo
    keeps_whole_states: bool
    tokens: int | None
    longest: int | None
    kv_bytes: dict[str, int]
    held_bytes: dict[str, dict[str, int]]
    prefix_bytes: int


@dataclass(frozen=True)
class OpenedCache:
    """A part's new cache; of its bytes, those that do not grow."""

    session: str
    margin: int
    fixed_bytes: int
    rows: tuple[RowsSize, ...]
