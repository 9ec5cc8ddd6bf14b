"""Index keys: what indexers choose tokens by. A row for every token, appended, beside the latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.pages import Pages
from engine.families.base import Segment


class IndexKeys:
    """The index keys of all layers that have indexers, float32.

    dims, devices  of each layer: channels, 0 for none, and where they lie
    pages          where their memory comes from
    """

    def __init__(
        self,
        dims: Sequence[int],
        devices: Sequence[torch.device],
        slots: int,
        capacity: int,
        pages: Pages,
    ) -> None:
        alike: dict[tuple[int, torch.device], list[int]] = {}
        for layer, (dim, device) in enumerate(zip(dims, devices, strict=True)):
            if dim:
                alike.setdefault((dim, device), []).append(layer)
        self._banks: list[torch.Tensor] = []  # [layers, slots, capacity, dim]
        self._layers: dict[int, torch.Tensor] = {}
        for (dim, device), layers in alike.items():
            bank = pages.reserve((len(layers), slots, capacity, dim), slot_axis=1, ratio=1, device=device)
            self._banks.append(bank)
            self._layers |= {layer: bank[at] for at, layer in enumerate(layers)}

    def appended(self, slot: int) -> list[torch.Tensor]:
        """A slot's rows as the prefix cache keeps them, `[capacity, layers, dim]`."""
        return [bank[:, slot].transpose(0, 1) for bank in self._banks]

    def layer(self, number: int) -> torch.Tensor:
        """A layer's keys, `[slots, capacity, dim]`."""
        return self._layers[number]

    def extend(self, layer: int, segment: Segment, keys: torch.Tensor) -> torch.Tensor:
        """Store the keys `[length, dim]` of a segment; return all that its slot then holds, `[end, dim]`."""
        held, end = self._layers[layer][segment.slot], segment.start + segment.length
        held[segment.start : end] = keys
        return held[:end]
