"""Rings of a sequence's last tokens: each token's row at its position modulo the ring's size."""

from __future__ import annotations

import torch


def extend_ring(ring: torch.Tensor, start: int, before: int, new: torch.Tensor) -> torch.Tensor:
    """Write `new` `[L, ...]`, of tokens from `start` on, into a ring `[size, ...]` of the last tokens.

    Returns it behind the `before` tokens that precede it, `[before + L, ...]`.
    """
    size, length = ring.shape[0], new.shape[0]
    joined = torch.cat((*_slices(ring, start - before, before), new))
    kept = min(size, length)
    at = length - kept
    for part in _slices(ring, start + at, kept):
        part.copy_(new[at : at + len(part)])
        at += len(part)
    return joined


def _slices(ring: torch.Tensor, start: int, length: int) -> list[torch.Tensor]:
    """Rows of the `length` <= size tokens from `start` on, as views: two where they pass the ring's end."""
    size = ring.shape[0]
    first = start % size
    parts = [ring[first : first + length], ring[: max(0, first + length - size)]]
    return [part for part in parts if len(part)]
