"""What a decoder's layers keep of sequences, for a fixed number of these, of fixed capacity.

Layers with attention keep the rows of all tokens, each in the place of its position; those with a sliding
window a ring of the last rows, some more than a token sees, so that a slot can be taken back by as many.
Layers with a state keep that alone; a decoder that has some can be taken back to where the state was copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.families.base import KvCache, Segment
from engine.families.decoder.description import Attention, DeltaNet, Description, Mixer, Mla
from engine.families.decoder.index_keys import IndexKeys
from engine.layers.recorded_experts import RecordedExperts
from memory.pages.spaces import zeros
from memory.planner.published import KV_MARGIN
from quant.formats.kv import index_key_rows, latent_rows, plain_rows
from quant.formats.kv_names import KvFormat
from quant.formats.rows import RowFormat, Rows, bytes_of, first_columns, row_bytes, rows_in, stored_as
from quant.kernels.cpu.cache_notes import KvPlace, StatePlace
from quant.kernels.cpu.program import Buffer

if TYPE_CHECKING:
    from engine.families.decoder.on_gpus import DecoderOnGpus

# Encodes rows `[..., dim]`, or leaves them as they are: `LayerOperations.encode_rows`.
Encode = Callable[[torch.Tensor, RowFormat | None], Rows]


@dataclass(frozen=True)
class KvRows:
    """What a layer keeps of a token.

    latent  None: keys and values; else keys alone, whose first so many columns are the values
    window  tokens that a token sees, itself among them, if not all
    form    how a head's row is encoded; None: float32
    """

    heads: int
    dim: int
    latent: int | None = None
    window: int | None = None
    form: RowFormat | None = None

    @classmethod
    def of(cls, attention: Attention | Mla, kv_format: KvFormat) -> KvRows:
        """The rows of a layer with this attention."""
        if isinstance(attention, Mla):
            form = latent_rows(kv_format, attention.rank, attention.rope.dims)
            return cls(1, attention.row_dim, attention.rank, form=form)
        form, window = plain_rows(kv_format, attention.head_dim), attention.window
        return cls(attention.kv_heads, attention.head_dim, window=window, form=form)

    @property
    def ring(self) -> int | None:
        """Places of the last tokens' rows, that of position p at p % ring; None: of all tokens'."""
        return None if self.window is None else self.window + KV_MARGIN

    @property
    def sides(self) -> int:
        """2 for keys and values, 1 for keys alone."""
        return 2 if self.latent is None else 1


@dataclass(frozen=True)
class StateShape:
    """What a layer keeps of a sequence whatever its length: states, and the convolution's last rows."""

    heads: int
    key_dim: int
    value_dim: int
    kept: int
    channels: int

    @classmethod
    def of(cls, d: DeltaNet) -> StateShape:
        """The state of this layer."""
        return cls(d.value_heads, d.key_dim, d.value_dim, d.taps - 1, d.channels)

    @property
    def values(self) -> int:
        """Values of a sequence."""
        return self.heads * self.key_dim * self.value_dim + self.kept * self.channels


def _kept_of(mixer: Mixer, kv_format: KvFormat) -> KvRows | StateShape:
    return StateShape.of(mixer) if isinstance(mixer, DeltaNet) else KvRows.of(mixer, kv_format)


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds: rows or a state of each layer, and the device that has them.

    index_dims  channels of each layer's index keys; 0 where it has no indexer
    """

    kept: tuple[KvRows | StateShape, ...]
    index_dims: tuple[int, ...]
    devices: tuple[torch.device, ...]
    kv_format: KvFormat

    @classmethod
    def of(
        cls, description: Description, devices: tuple[torch.device, ...], kv_format: KvFormat
    ) -> CacheLayout:
        """The layout for a decoder whose layers are on `devices`."""
        mixers = [layer.attention for layer in description.layers]
        kept = tuple(_kept_of(mixer, kv_format) for mixer in mixers)
        return cls(kept, tuple(map(_index_dim, mixers)), devices, kv_format)

    @property
    def has_index_keys(self) -> bool:
        """Whether some layer has an indexer."""
        return any(self.index_dims)

    def layer_bytes(self, layer: int, slots: int, capacity: int) -> int:
        """Bytes of a layer's keys and values and of its index keys, or of its states."""
        kept = self.kept[layer]
        if isinstance(kept, StateShape):
            return slots * kept.values * torch.float32.itemsize
        nbytes = kept.sides * kept.heads * row_bytes(kept.dim, kept.form)
        if dim := self.index_dims[layer]:
            nbytes += row_bytes(dim, self.index_keys_as(dim))
        return slots * (kept.ring or capacity) * nbytes

    def index_keys_as(self, dim: int) -> RowFormat | None:
        """How index keys of so many channels are kept."""
        return index_key_rows(self.kv_format, dim)

    def margin(self, capacity: int) -> int:
        """Tokens by which a slot can be taken back."""
        if any(isinstance(kept, StateShape) for kept in self.kept):
            return 0
        return KV_MARGIN if any(isinstance(kept, KvRows) and kept.ring for kept in self.kept) else capacity

    def banks(self) -> list[list[int]]:
        """Layers of the same sizes on the same device, which share an allocation."""
        found: dict[object, list[int]] = {}
        for layer, key in enumerate(zip(self.kept, self.devices, strict=True)):
            found.setdefault(key, []).append(layer)
        return list(found.values())


class DecoderCache(KvCache):
    """Keys and values, or states, of every layer.

    routed      the experts of its program, if it has any
    index_keys  of the layers that have indexers
    last_states  what its program captures; None where nothing is
    decoder     the recorded step on several devices that decodes with it
    on_host     bytes of that step's programs in host memory
    """

    last_states: Buffer | None = None

    routed: RecordedExperts | None = None
    decoder: DecoderOnGpus | None = None
    on_host: int = 0

    def __init__(self, layout: CacheLayout, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, margin=layout.margin(capacity))
        self.layout = layout
        self._banks: list[torch.Tensor] = []  # [sides, layers, slots, kv_heads, capacity, head_dim]
        self._rings: list[torch.Tensor] = []  # [sides, layers, slots, kv_heads, ring, head_dim]
        self._layers: dict[int, Rows] = {}  # [sides, slots, kv_heads, capacity or ring, head_dim]
        self._states: dict[int, StatePlace] = {}
        for layers in layout.banks():
            rows = layout.kept[layers[0]]
            if isinstance(rows, StateShape):
                tails, states = (
                    zeros((len(layers), slots, *sizes), layout.devices[layers[0]])
                    for sizes in ((rows.kept, rows.channels), (rows.heads, rows.key_dim, rows.value_dim))
                )
                self._states |= {n: StatePlace(tails[at], states[at]) for at, n in enumerate(layers)}
                continue
            width, dtype = stored_as(rows.dim, rows.form)
            shape = (rows.sides, len(layers), slots, rows.heads, rows.ring or capacity, width)
            device = layout.devices[layers[0]]
            if rows.ring:
                bank = zeros(shape, device, dtype)
            else:
                bank = self.pages.reserve(shape, slot_axis=2, ratio=1, device=device, dtype=dtype)
            (self._rings if rows.ring else self._banks).append(bank)
            self._layers |= {layer: rows_in(bank[:, at], rows.form) for at, layer in enumerate(layers)}
        self.index_keys = IndexKeys(
            layout.index_dims, layout.devices, layout.index_keys_as, slots, capacity, self.pages
        )

    def bytes_at(self, tokens: int) -> int:
        program = self.on_host if self.program is None else self.program.nbytes
        layers = range(len(self.layout.kept))
        return program + sum(self.layout.layer_bytes(layer, self.slots, tokens) for layer in layers)

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        rows = [bank[:, :, slot].permute(3, 0, 1, 2, 4) for bank in self._banks]
        return tuple((1, held) for held in (*rows, *self.index_keys.appended(slot)))

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        rings = [ring[:, :, slot, :, : min(length, ring.shape[4])] for ring in self._rings]
        return *rings, *(part[slot] for s in self._states.values() for part in (s.tails, s.states))

    def extend(
        self, encode: Encode, layer: int, segment: Segment, k: torch.Tensor, v: torch.Tensor | None
    ) -> tuple[Rows, Rows]:
        """Store k and v `[tokens, kv_heads * head_dim]`; return the slot, `[kv_heads, end, head_dim]`; of a
        ring, what these tokens see.

        v: None where the values are columns of the keys.
        """
        end, rows = segment.start + segment.length, self._rows(layer)
        held = bytes_of(self._layers[layer])[:, segment.slot]
        fresh = [
            bytes_of(encode(new.view(segment.length, rows.heads, rows.dim), rows.form))
            for new in ((k,) if v is None else (k, v))
        ]  # [tokens, kv_heads, .]
        if rows.window is not None:
            seen = [
                rows_in(_extend(ring, new, segment.start, rows.window), rows.form)
                for ring, new in zip(held, fresh, strict=True)
            ]
            return seen[0], seen[1]
        for side, new in zip(held, fresh, strict=True):
            side[:, segment.start : end] = new.transpose(0, 1)
        keys, values = self.layer(layer)
        return keys[segment.slot, :, :end], values[segment.slot, :, :end]

    def layer(self, number: int) -> tuple[Rows, Rows]:
        """A layer's keys and values, `[slots, kv_heads, capacity, .]` each, or a ring's places."""
        held, rows = self._layers[number], self._rows(number)
        return held[0], held[1] if rows.latent is None else first_columns(held[0], rows.latent)

    def state(self, number: int) -> StatePlace:
        """A layer's states."""
        return self._states[number]

    def place(self, number: int) -> KvPlace | StatePlace:
        """Where a recorded step finds what a layer keeps."""
        if number in self._states:
            return self._states[number]
        return KvPlace(*self.layer(number), self._rows(number).ring)

    def _rows(self, layer: int) -> KvRows:
        rows = self.layout.kept[layer]
        assert isinstance(rows, KvRows)
        return rows


def _extend(ring: torch.Tensor, new: torch.Tensor, start: int, window: int) -> torch.Tensor:
    """Write rows `[tokens, kv_heads, head_dim]`, from position `start` on, to `[kv_heads, ring, head_dim]`.

    Returns them behind those before them that the first one sees, `[kv_heads, before + tokens, head_dim]`.
    """
    length, places = len(new), ring.shape[1]
    fresh = new.transpose(0, 1)
    earlier = torch.arange(max(0, start - window + 1), start, device=ring.device) % places
    joined = torch.cat((ring[:, earlier], fresh), dim=1)
    kept = min(length, places)
    ring[:, torch.arange(start + length - kept, start + length, device=ring.device) % places] = fresh[
        :, -kept:
    ]
    return joined


def _index_dim(attention: Mixer) -> int:
    indexer = attention.own_indexer if isinstance(attention, Mla) else None
    return 0 if indexer is None else indexer.dim
