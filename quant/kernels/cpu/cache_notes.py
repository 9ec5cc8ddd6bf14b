"""What a recorder notes of the state of sequences: keys and values, windows, compressed entries, states."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quant.formats.rows import Rows, bytes_of
from quant.kernels.cpu.native_rows import format_address
from quant.kernels.cpu.program import Buffer, Operand
from quant.kernels.cpu.row_notes import RowNotes
from quant.kernels.layers import DeltaRule


@dataclass(frozen=True)
class KvPlace:
    """Where a layer's keys and values lie: row `position` of head h of a slot.

    keys, values `[slots, kv_heads, capacity, head_dim]`, perhaps views of something larger; values may be the
    first columns of the keys. ring: None, or how many places there are instead of a capacity; the row is that
    of position % ring.
    """

    keys: Rows
    values: Rows
    ring: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """kv_heads, head_dim, and the strides of a head and of a slot in bytes."""
        held = bytes_of(self.keys)
        slot, head, _, _ = held.stride()
        return self.keys.shape[1], self.keys.shape[3], head * held.itemsize, slot * held.itemsize


def slot_bytes(rows: Rows) -> int:
    """From a slot's rows to the next one's, where the first dimension is the slot."""
    held = bytes_of(rows)
    return held.stride(0) * held.itemsize


@dataclass(frozen=True)
class StatePlace:
    """Where a layer has its states, one for each slot, for `LayerOperations.convolve` and `delta_rule`.

    tails `[slots, taps - 1, channels]`, states `[slots, value_heads, key_dim, value_dim]` float32
    """

    tails: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True)
class Selector:
    """How compressed entries are chosen: the `top_k` best, perhaps of the `blocks` best blocks of `block`."""

    top_k: int
    block: int
    blocks: int


class CacheNotes(RowNotes):
    """Notes operations on what a cache's slots hold."""

    def _at(self, rows: Rows) -> int:
        """Where rows of a cache lie."""
        return self._address(bytes_of(rows))

    def append(self, keys: Buffer, values: Buffer | None, place: KvPlace) -> None:
        """Write keys and values to the cache, each row at its slot and position; keys alone where the values
        are columns of theirs."""
        to = [self._at(place.keys), self._at(place.values)]
        self._note("append", [keys, values, format_address(place.keys)], to, [*place.sizes, place.ring or 0])

    def attend(
        self,
        q: Buffer,
        place: KvPlace,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        chosen: Buffer | None = None,
    ) -> Buffer:
        """Attention of each row over what its slot holds up to its position: see `LayerOperations.attend`.

        chosen  `[rows, k]` int64: these positions alone, of keys that all heads share and that begin with the
                values; see `LayerOperations.attend_chosen`
        """
        kv_heads, dim, head, slot = place.sizes
        heads, value_dim = q.width // dim, place.values.shape[3]
        out = self.buffer(heads * value_dim)
        at = None if sinks is None else self._weight(sinks)
        inputs: list[Operand] = [q, self._at(place.keys), self._at(place.values), at, chosen]
        inputs.append(format_address(place.keys))
        choices = 0 if chosen is None else chosen.width
        sizes = [heads, kv_heads, dim, head, slot, window or 0, value_dim, choices, place.ring or 0]
        self._note("attend", inputs, [out], sizes)
        return out

    def convolve(self, x: Buffer, weights: torch.Tensor, place: StatePlace) -> Buffer:
        """Each row convolved with those before it in its slot: see `LayerOperations.convolve`."""
        out, tails = self.buffer(x.width), place.tails
        outputs: list[Operand] = [out, self._address(tails)]
        sizes = [x.width, len(weights), tails.stride(0)]
        self._note("convolve", [x, self._weight(weights)], outputs, sizes)
        return out

    def delta_rule(self, x: Buffer, a: Buffer, b: Buffer, rule: DeltaRule, place: StatePlace) -> Buffer:
        """The state of each row's slot, changed and asked: see `LayerOperations.delta_rule`."""
        states = place.states
        _, heads, key_dim, value_dim = states.shape
        out = self.buffer(heads * value_dim)
        inputs: list[Operand] = [x, a, b, self._weight(rule.rates), self._weight(rule.biases)]
        outputs: list[Operand] = [out, self._address(states)]
        sizes = [rule.key_heads, heads, key_dim, value_dim, states.stride(0)]
        self._note("delta_rule", inputs, outputs, sizes)
        return out

    # ------------------------------------------------------------- windows and compressed entries

    def ring(self, x: Buffer, to: Rows) -> None:
        """Write x into the rings `[slots, ring, width]`, each row at its slot and position."""
        _, places, width = to.shape
        self._note("ring", [x, format_address(to)], [self._at(to)], [width, places, slot_bytes(to)])

    def attend_sparse(
        self,
        q: Buffer,
        rings: Rows,
        sink: torch.Tensor,
        window: int,
        compressed: Rows | None,
        chosen: Buffer | None,
        every: int | None = None,
    ) -> Buffer:
        """Attention over the last `window` latents in rings `[slots, ring, dim]`, and over those `chosen` of
        the compressed entries `[slots, entries, dim]`; or over all that stand for `every` so many tokens."""
        _, places, dim = rings.shape
        out = self.buffer(q.width)
        formats = (ctypes.c_void_p * 2)(format_address(rings), format_address(compressed))
        self._recording.held.append(formats)
        inputs: list[Operand] = [q, self._at(rings), self._weight(sink), None, None]
        inputs.append(ctypes.addressof(formats))
        sizes = [q.width // dim, dim, window, places, slot_bytes(rings), 0, 0, 0]
        if compressed is not None and every is not None:
            entries = compressed.shape[1]
            inputs[3:5] = [self._at(compressed), self._address(torch.arange(entries))]
            sizes[5:] = [entries, slot_bytes(compressed), every]
        elif compressed is not None and chosen is not None:
            inputs[3:5] = [self._at(compressed), chosen]
            sizes[5:] = [chosen.width, slot_bytes(compressed), 0]
        self._note("attend_sparse", inputs, [out], sizes)
        return out

    @contextmanager
    def if_complete(self, ratio: int) -> Iterator[None]:
        """Operations that are skipped while no row is the last token of a group of `ratio`."""
        at = len(self._recording.noted)
        self._note("unless_complete", [], [], [ratio, 0])
        yield
        self._recording.noted[at].sizes[1] = len(self._recording.noted) - at - 1

    def pool(self, rows: torch.Tensor, gates: torch.Tensor, ratio: int, *, overlaps: bool = False) -> Buffer:
        """The last `ratio` rows in rings `[slots, ring, dim]`, pooled; for rows that complete a group.

        overlaps: of the group's rows `[2 * dim]` the second halves, with the first ones of the group before.
        """
        _, places, width = rows.shape
        dim = width // 2 if overlaps else width
        out = self.buffer(dim)
        inputs = [self._address(rows), self._address(gates)]
        self._note("pool", inputs, [out], [dim, places, rows.stride(0), ratio, int(overlaps)])
        return out

    def entry(self, x: Buffer, to: Rows, ratio: int) -> None:
        """Write x, of rows that complete a group, among the entries `[slots, groups, width]`."""
        self._note("entry", [x, format_address(to)], [self._at(to)], [x.width, slot_bytes(to), ratio])

    def select(
        self,
        queries: Buffer,
        weights: Buffer,
        keys: Rows,
        ratio: int,
        selector: Selector,
        pool: Buffer | None,
        *,
        makes_pool: bool,
    ) -> tuple[Buffer, Buffer | None]:
        """The entries that each row attends to, int64, -1 behind; and the best blocks, where later choices
        are to be made among these. Index keys `[slots, entries, dim]`."""
        _, entries, dim = keys.shape
        chosen = self.buffer(selector.top_k, torch.int64)
        named = selector.block * selector.blocks if pool is not None else 0
        columns = max(named, entries, 1)
        scores, names = self.buffer(columns, rows=1), self.buffer(max(named, 1), torch.int64, rows=1)
        blocks = self.buffer(selector.blocks, torch.int64) if makes_pool else None
        self._note(
            "select",
            [queries, weights, self._at(keys), pool, format_address(keys)],
            [chosen, scores, names, blocks],
            [weights.width, dim, ratio, slot_bytes(keys), selector.top_k, selector.block, selector.blocks],
        )
        return chosen, blocks
