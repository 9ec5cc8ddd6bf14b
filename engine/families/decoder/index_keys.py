"""Index keys: what indexers choose tokens by. A row for every token, appended, beside the latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.cache.pages import Pages
from engine.families.base import Segment
from quant.formats.rows import RowFormat, Rows, bytes_of, row_format_of, rows_in, stored_as


class IndexKeys:
    """The index keys of all layers that have indexers.

    dims, devices  of each layer: channels, 0 for none, and where they lie
    form           how keys of so many channels are kept
    pages          where their memory comes from
    """

    def __init__(
        self,
        dims: Sequence[int],
        devices: Sequence[torch.device],
        form: Callable[[int], RowFormat | None],
        slots: int,
        capacity: int,
        pages: Pages,
    ) -> None:
        alike: dict[tuple[int, torch.device], list[int]] = {}
        for layer, (dim, device) in enumerate(zip(dims, devices, strict=True)):
            if dim:
                alike.setdefault((dim, device), []).append(layer)
        self._banks: list[Rows] = []  # [layers, slots, capacity, dim]
        self._layers: dict[int, Rows] = {}
        for (dim, device), layers in alike.items():
            width, dtype = stored_as(dim, form(dim))
            size = len(layers), slots, capacity, width
            kept = pages.reserve(size, slot_axis=1, ratio=1, device=device, dtype=dtype)
            bank = rows_in(kept, form(dim))
            self._banks.append(bank)
            self._layers |= {layer: bank[at] for at, layer in enumerate(layers)}

    def appended(self, slot: int) -> list[torch.Tensor]:
        """A slot's rows as the prefix cache keeps them, `[capacity, layers, dim]`."""
        return [bytes_of(bank)[:, slot].transpose(0, 1) for bank in self._banks]

    def layer(self, number: int) -> Rows:
        """A layer's keys, `[slots, capacity, dim]`."""
        return self._layers[number]

    def extend(
        self,
        encode: Callable[[torch.Tensor, RowFormat | None], Rows],
        layer: int,
        segment: Segment,
        keys: torch.Tensor,
    ) -> Rows:
        """Store the keys `[length, dim]` of a segment; return all that its slot then holds, `[end, dim]`."""
        held, end = self._layers[layer][segment.slot], segment.start + segment.length
        bytes_of(held)[segment.start : end] = bytes_of(encode(keys, row_format_of(held)))
        return held[:end]
