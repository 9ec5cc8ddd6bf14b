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
from engine.families.decoder.description import Description
from engine.layers.recorded_experts import RecordedExperts


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds: kv_heads and head_dim of each layer, and the device that has it."""

    heads: tuple[tuple[int, int], ...]
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, description: Description, devices: tuple[torch.device, ...]) -> CacheLayout:
        """The layout for a decoder whose layers are on `devices`."""
        return cls(
            tuple((layer.attention.kv_heads, layer.attention.head_dim) for layer in description.layers),
            devices,
        )

    def layer_bytes(self, layer: int, slots: int, capacity: int) -> int:
        """Bytes of a layer's keys and values."""
        return 2 * slots * capacity * math.prod(self.heads[layer]) * torch.float32.itemsize

    def banks(self) -> list[list[int]]:
        """Layers of the same sizes on the same device, which share an allocation."""
        found: dict[object, list[int]] = {}
        for layer, key in enumerate(zip(self.heads, self.devices, strict=True)):
            found.setdefault(key, []).append(layer)
        return list(found.values())


class DecoderCache(KvCache):
    """Keys and values of every layer, float32.

    routed  the experts of its program, if it has any
    """

    routed: RecordedExperts | None = None

    def __init__(self, layout: CacheLayout, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, margin=capacity)
        self.layout = layout
        self._banks: list[torch.Tensor] = []  # [2, layers, slots, kv_heads, capacity, head_dim]
        self._layers: dict[int, torch.Tensor] = {}  # [2, slots, kv_heads, capacity, head_dim]
        for layers in layout.banks():
            kv_heads, head_dim = layout.heads[layers[0]]
            shape = (2, len(layers), slots, kv_heads, capacity, head_dim)
            bank = _allocate(shape, layout.devices[layers[0]])
            self._banks.append(bank)
            self._layers |= {layer: bank[:, at] for at, layer in enumerate(layers)}

    @property
    def nbytes(self) -> int:
        program = 0 if self.program is None else self.program.nbytes
        return sum(bank.nbytes for bank in self._banks) + program

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        return tuple((1, bank[:, :, slot].permute(3, 0, 1, 2, 4)) for bank in self._banks)

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        return ()

    def extend(
        self, layer: int, segment: Segment, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v `[tokens, kv_heads, head_dim]`; return the slot, `[kv_heads, end, head_dim]`."""
        end = segment.start + segment.length
        keys, values = self._layers[layer][:, segment.slot]
        keys[:, segment.start : end] = k.transpose(0, 1)
        values[:, segment.start : end] = v.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, `[slots, kv_heads, capacity, head_dim]` each."""
        keys, values = self._layers[number]
        return keys, values


def _allocate(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Zeros. In host memory, untouched pages cost none.

    Torch would use huge pages there, of which even a short sequence needs one per layer and head.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device)
    nbytes = math.prod(shape) * torch.float32.itemsize
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=torch.float32).view(shape)
