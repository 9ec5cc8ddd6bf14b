"""What the engine needs of whatever keeps the states of a cache's slots for later prompts.

`engine/cache/prefix.py` keeps them in this process; a model in parts keeps them with its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Prefix:
    """What was restored into a slot.

    length  tokens that the slot now holds, 0 where nothing fitted
    logits  `[vocab]` after the last of them, if that is the whole prompt
    stops   where the prefill is to pause, for the state there to be saved: where the prompt diverges from all
            cached ones, and before the tokens at a chat prompt's end that open the answer: the next turn
            has others
    """

    length: int
    logits: torch.Tensor | None = None
    stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class PrefixStats:
    """A snapshot for metrics; all but nbytes and budget_bytes only grow."""

    queries: int
    hits: int
    cached_tokens: int
    evictions: int
    nbytes: int
    budget_bytes: int


class Prefixes(Protocol):
    """Saves and restores the state of a cache's slots; see `PrefixCache`. Used by one thread."""

    @property
    def stats(self) -> PrefixStats:
        """Current counters and gauges."""
        ...

    def lend(self, nbytes: int) -> bool:
        """Give up so much memory until `take_back`; False where there is not so much."""
        ...

    def take_back(self, nbytes: int) -> None:
        """So much that was lent is free again."""
        ...

    def restore(self, slot: int, prompt: list[int], salt: str = "") -> Prefix:
        """Restore the longest cached prefix of `prompt` into the empty `slot`."""
        ...

    def save(self, slot: int, tokens: list[int], salt: str = "", logits: torch.Tensor | None = None) -> None:
        """Save the state of `slot`, which holds exactly `tokens`; `logits` `[vocab]` are those after them."""
        ...
