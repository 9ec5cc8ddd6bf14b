"""Requests a step's Engram rows before its forward, and a decoded token's as soon as it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from engine.layers.engram_hash import EngramHash
from memory.engram.store import RowsTicket


@dataclass(frozen=True)
class _Part:
    """Rows of tokens `[tables, tokens, columns]`, asked for together, and a ticket for each table's."""

    rows: np.ndarray
    tickets: list[RowsTicket]


@dataclass(frozen=True)
class _Picked:
    """Some tokens of a part, in the order in which the step has them."""

    part: _Part
    tokens: list[int]

    def wait(self, table: int) -> torch.Tensor:
        """Values, `[tokens, columns * dim]`."""
        whole = self.part.rows.shape[1]
        values = self.part.tickets[table].wait().view(whole, -1)
        return values if self.tokens == list(range(whole)) else values[self.tokens]


@dataclass(frozen=True)
class StepRows:
    """Pending rows of a step's tokens: parts in token order."""

    parts: list[_Picked]

    def is_there(self, table: int) -> bool:
        """True if `wait` would not block."""
        return all(picked.part.tickets[table].is_done for picked in self.parts)

    def wait(self, table: int) -> torch.Tensor:
        """Values of all tokens, `[tokens, columns * dim]`; raises what the lookup raised."""
        values = [picked.wait(table) for picked in self.parts]
        return values[0] if len(values) == 1 else torch.cat(values)

    @property
    def rows(self) -> torch.Tensor:
        """Which rows, `[tokens, tables, columns]`."""
        rows = np.concatenate([picked.part.rows[:, picked.tokens] for picked in self.parts], axis=1)
        return torch.from_numpy(rows).transpose(0, 1)


class Store(Protocol):
    """Where rows come from."""

    def lookup(self, layer: int, rows: torch.Tensor) -> RowsTicket:
        """Ask for rows `[n]` int64 of a layer's table."""
        ...


class EngramLookup:
    """Lookups in the tables of `layers`, whose addresses `hashing` gives.

    What a token needs follows from its own key and the few before it alone, so rows asked for ahead are
    known again by these keys, whatever has become of the sequence that they were asked for.
    """

    def __init__(self, layers: Sequence[int], hashing: EngramHash, store: Store) -> None:
        self.layers = layers
        self.hashing = hashing
        self._store = store
        self._ahead: dict[tuple[int, ...], tuple[_Part, int]] = {}

    @property
    def columns(self) -> int:
        """Rows per token and table."""
        return self.hashing.columns

    def expect(self, windows: np.ndarray) -> None:
        """Ask for the rows of tokens that the next step will probably hold: keys `[tokens, history + 1]`."""
        new = [w for w in dict.fromkeys(map(tuple, windows.tolist())) if w not in self._ahead]
        if new:
            part = self._ask(np.array(new))
            self._ahead.update({window: (part, at) for at, window in enumerate(new)})

    def begin(self, segments: Sequence[np.ndarray]) -> StepRows:
        """Ask for the rows of all tokens of a step; each segment's keys `[history + L]` int64."""
        ahead, self._ahead = self._ahead, {}
        parts: list[_Picked] = []
        unasked: list[np.ndarray] = []

        def ask() -> None:
            if unasked:
                part = self._ask(self.windows(unasked))
                parts.append(_Picked(part, list(range(part.rows.shape[1]))))
                unasked.clear()

        for keys in segments:
            known = ahead.get(tuple(keys.tolist())) if len(keys) == self.hashing.history + 1 else None
            if known is None:
                unasked.append(keys)
                continue
            ask()
            part, token = known
            if parts and parts[-1].part is part:
                parts[-1].tokens.append(token)
            else:
                parts.append(_Picked(part, [token]))
        ask()
        return StepRows(parts)

    def rows_of(self, windows: np.ndarray) -> np.ndarray:
        """The rows that keys `[tokens, history + 1]` ask of each table, `[tables, tokens, columns]`."""
        return self.hashing.rows(windows)

    def windows(self, segments: Sequence[np.ndarray]) -> np.ndarray:
        """Segments of keys `[history + L]` token by token, `[tokens, history + 1]`."""
        width = self.hashing.history + 1
        return np.concatenate(
            [keys[None] if len(keys) == width else sliding_window_view(keys, width) for keys in segments]
        )

    def _ask(self, windows: np.ndarray) -> _Part:
        rows = self.rows_of(windows)
        tickets = [
            self._store.lookup(layer, torch.from_numpy(table_rows.reshape(-1)))
            for layer, table_rows in zip(self.layers, rows, strict=True)
        ]
        return _Part(rows, tickets)
