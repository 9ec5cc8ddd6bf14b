"""Consecutive layers of a checkpoint as one of their own, for a machine that computes only these."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry

# What names of layers' tensors begin with; draft layers and image encoders begin otherwise.
LAYER = re.compile(r"((?:model\.(?:language_model\.)?)?layers\.|blk\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Span:
    """Layers `first` up to `stop` of a model of so many."""

    first: int
    stop: int
    layers: int

    @property
    def is_first(self) -> bool:
        """Whether the embedding is with them."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether the head is with them."""
        return self.stop == self.layers

    def __str__(self) -> str:
        return f"layers {self.first} to {self.stop - 1}"

    @classmethod
    def between(cls, cuts: Collection[int], layers: int) -> list[Span]:
        """The parts of a model that is cut before these layers, in order."""
        ends = [0, *sorted(cuts), layers]
        return [cls(first, stop, layers) for first, stop in pairwise(ends)]


class PartOfCheckpoint(Checkpoint):
    """The layers of a span, numbered from 0, and what lies outside of layers and is kept.

    outside  names of matrices and norms outside of layers, without endings
    """

    def __init__(self, whole: Checkpoint, span: Span, outside: Collection[str]) -> None:
        entries: dict[str, TensorEntry] = {}
        for name, entry in whole.entries.items():
            found = LAYER.fullmatch(name)
            if found is None:
                if name in outside or name.rpartition(".")[0] in outside:
                    entries[name] = entry
                continue
            number = int(found[2])
            if span.first <= number < span.stop:
                renamed = f"{found[1]}{number - span.first}{found[3]}"
                entries[renamed] = replace(entry, name=renamed)
        super().__init__(whole.path, whole.model_type, whole.config, entries, whole.problems)
        self.whole = whole
        self.span = span
