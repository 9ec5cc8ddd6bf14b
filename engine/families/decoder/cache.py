"""Keys and values of a decoder's layers, for a fixed number of sequences of fixed capacity.

Every layer keeps the rows of all tokens, also one with a sliding window: so a slot can be taken back to any
length, and a row's place is its position.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch

from engine.families.base import KvCache, Segment
from engine.families.decoder.description import Attention, Description, Mla
from engine.families.decoder.index_keys import IndexKeys
from engine.layers.recorded_experts import RecordedExperts


@dataclass(frozen=True)
class KvRows:
    """What a layer keeps of a token.

    latent  None: keys and values; else keys alone, whose first so many columns are the values
    """

    heads: int
    dim: int
    latent: int | None = None

    @classmethod
    def of(cls, attention: Attention | Mla) -> KvRows:
        """The rows of a layer with this attention."""
        if isinstance(attention, Mla):
            return cls(1, attention.row_dim, attention.rank)
        return cls(attention.kv_heads, attention.head_dim)

    @property
    def sides(self) -> int:
        """2 for keys and values, 1 for keys alone."""
        return 2 if self.latent is None else 1


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds: the rows of each layer, and the device that has them.

    index_dims  channels of each layer's index keys; 0 where it has no indexer
    """

    rows: tuple[KvRows, ...]
    index_dims: tuple[int, ...]
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, description: Description, devices: tuple[torch.device, ...]) -> CacheLayout:
        """The layout for a decoder whose layers are on `devices`."""
        attentions = [layer.attention for layer in description.layers]
        return cls(tuple(KvRows.of(a) for a in attentions), tuple(_index_dim(a) for a in attentions), devices)

    @property
    def has_index_keys(self) -> bool:
        """Whether some layer has an indexer."""
        return any(self.index_dims)

    def layer_bytes(self, layer: int, slots: int, capacity: int) -> int:
        """Bytes of a layer's keys and values, and of its index keys."""
        rows = self.rows[layer]
        values = rows.sides * rows.heads * rows.dim + self.index_dims[layer]
        return slots * capacity * values * torch.float32.itemsize

    def banks(self) -> list[list[int]]:
        """Layers of the same sizes on the same device, which share an allocation."""
        found: dict[object, list[int]] = {}
        for layer, key in enumerate(zip(self.rows, self.devices, strict=True)):
            found.setdefault(key, []).append(layer)
        return list(found.values())


class DecoderCache(KvCache):
    """Keys and values of every layer, float32.

    routed      the experts of its program, if it has any
    index_keys  of the layers that have indexers
    """

    routed: RecordedExperts | None = None

    def __init__(self, layout: CacheLayout, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, margin=capacity)
        self.layout = layout
        self._banks: list[torch.Tensor] = []  # [sides, layers, slots, kv_heads, capacity, head_dim]
        self._layers: dict[int, torch.Tensor] = {}  # [sides, slots, kv_heads, capacity, head_dim]
        for layers in layout.banks():
            rows = layout.rows[layers[0]]
            shape = (rows.sides, len(layers), slots, rows.heads, capacity, rows.dim)
            bank = _allocate(shape, layout.devices[layers[0]])
            self._banks.append(bank)
            self._layers |= {layer: bank[:, at] for at, layer in enumerate(layers)}
        self.index_keys = IndexKeys(layout.index_dims, layout.devices, slots, capacity, _allocate)

    @property
    def nbytes(self) -> int:
        program = 0 if self.program is None else self.program.nbytes
        return sum(bank.nbytes for bank in self._banks) + self.index_keys.nbytes + program

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        rows = [bank[:, :, slot].permute(3, 0, 1, 2, 4) for bank in self._banks]
        return tuple((1, held) for held in (*rows, *self.index_keys.appended(slot)))

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        return ()

    def extend(
        self, layer: int, segment: Segment, k: torch.Tensor, v: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v `[tokens, kv_heads * head_dim]`; return the slot, `[kv_heads, end, head_dim]`.

        v: None where the values are columns of the keys.
        """
        end, rows = segment.start + segment.length, self.layout.rows[layer]
        for held, new in zip(self._layers[layer], (k,) if v is None else (k, v), strict=True):
            fresh = new.view(segment.length, rows.heads, rows.dim)
            held[segment.slot, :, segment.start : end] = fresh.transpose(0, 1)
        keys, values = self.layer(layer)
        return keys[segment.slot, :, :end], values[segment.slot, :, :end]

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, `[slots, kv_heads, capacity, .]` each."""
        held, rows = self._layers[number], self.layout.rows[number]
        return held[0], held[1] if rows.latent is None else held[0][..., : rows.latent]


def _index_dim(attention: Attention | Mla) -> int:
    indexer = attention.own_indexer if isinstance(attention, Mla) else None
    return 0 if indexer is None else indexer.dim


def _allocate(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Zeros. In host memory, untouched pages cost none.

    Torch would use huge pages there, of which even a short sequence needs one per layer and head.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device)
    nbytes = math.prod(shape) * torch.float32.itemsize
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=torch.float32).view(shape)
