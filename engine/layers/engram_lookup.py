"""Asking for a step's Engram rows before its forward, and for a decoded token's as soon as it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.layers.engram_hash import EngramHash
from memory.engram_store import RowsTicket


@dataclass(frozen=True)
class _Part:
    """Rows of consecutive tokens `[tables, tokens, columns]`, and a ticket for each table's."""

    rows: torch.Tensor
    tickets: list[RowsTicket]


@dataclass(frozen=True)
class StepRows:
    """Rows of a step's tokens, on their way: parts in the order of the tokens."""

    parts: list[_Part]

    def wait(self, table: int) -> torch.Tensor:
        """Values of all tokens, `[tokens, columns * dim]`; raises what the look-up raised."""
        values = [part.tickets[table].wait().view(part.rows.shape[1], -1) for part in self.parts]
        return values[0] if len(values) == 1 else torch.cat(values)

    @property
    def rows(self) -> torch.Tensor:
        """Which rows, `[tokens, tables, columns]`."""
        return torch.cat([part.rows for part in self.parts], dim=1).transpose(0, 1)


class Store(Protocol):
    """Where rows come from."""

    def lookup(self, layer: int, rows: torch.Tensor) -> RowsTicket:
        """Ask for rows `[n]` int64 of a layer's table."""
        ...


class EngramLookup:
    """Look-ups in the tables of `layers`, whose addresses `hashes` give.

    What a token needs follows from its own key and the few before it alone, so rows asked for ahead are
    known again by these keys, whatever has become of the sequence that they were asked for.
    """

    def __init__(self, layers: Sequence[int], hashes: Sequence[EngramHash], store: Store) -> None:
        self.layers = layers
        self.hashes = hashes
        self._store = store
        self._ahead: dict[tuple[int, ...], _Part] = {}

    @property
    def columns(self) -> int:
        """Rows that a token asks of each table."""
        return len(self.hashes[0].primes)

    def expect(self, keys: torch.Tensor) -> None:
        """Ask for the rows of one token that the next step will probably hold: keys `[history + 1]`."""
        if self.hashes:
            window = tuple(keys.tolist())
            if window not in self._ahead:
                self._ahead[window] = self._ask([keys])

    def begin(self, segments: Sequence[torch.Tensor]) -> StepRows:
        """Ask for the rows of all tokens of a step; each segment's keys `[history + L]`."""
        ahead, self._ahead = self._ahead, {}
        parts: list[_Part] = []
        unasked: list[torch.Tensor] = []
        for keys in segments:
            known = ahead.get(tuple(keys.tolist())) if len(keys) == self.hashes[0].history + 1 else None
            if known is None:
                unasked.append(keys)
                continue
            if unasked:
                parts.append(self._ask(unasked))
                unasked = []
            parts.append(known)
        if unasked:
            parts.append(self._ask(unasked))
        return StepRows(parts)

    def rows_of(self, segments: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows that segments of keys `[history + L]` ask of each table, `[tables, tokens, columns]`."""
        return torch.stack([torch.cat([h.rows(keys) for keys in segments]) for h in self.hashes])

    def _ask(self, segments: Sequence[torch.Tensor]) -> _Part:
        rows = self.rows_of(segments)
        tickets = [
            self._store.lookup(layer, table_rows.flatten())
            for layer, table_rows in zip(self.layers, rows, strict=True)
        ]
        return _Part(rows, tickets)
