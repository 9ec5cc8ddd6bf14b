"""Engram tables while they are trained: a step gathers the rows it needs and updates only those."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quantise import straight_through

BETAS, EPS = (0.9, 0.99), 1e-10
DECAY = 1.0  # per learning rate, each time a row is touched: what points now here, now there does not add up


class Table:
    """One layer's table `[rows, dim]` with Adam's two moments, updated lazily.

    The moments of untouched rows stand still, and nothing is corrected for their youth: with these
    betas the first step of a fresh row is one learning rate in every channel.
    """

    def __init__(self, rows: int, dim: int, generator: torch.Generator) -> None:
        self.weight = torch.randn(rows, dim, generator=generator) * 0.01
        self.mean = torch.zeros(rows, dim)
        self.square = torch.zeros(rows, dim)

    def gather(self, rows: Tensor, kept: Tensor | None = None) -> Gathered:
        """The rows `[N, columns]` that a step needs; what is looked up is multiplied by `kept`."""
        unique, inverse = rows.unique(return_inverse=True)
        return Gathered(self, unique, inverse, kept)


def dropout(shape: torch.Size, share: float, seed: int) -> Tensor:
    """Multipliers for look-ups: 0 for about `share` of them, the others scaled up to make good for it.

    A row knows by heart what followed in the few texts that it was trained on. Where some rows are
    always missing, the model learns to doubt each of them, as it must with text that it has not seen.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) >= share).float() / (1 - share)


class Gathered:
    """Rows taken out of a table for one step: read them through `values`, then `update`."""

    def __init__(self, table: Table, rows: Tensor, places: Tensor, kept: Tensor | None) -> None:
        self.table, self.rows, self.places, self.kept = table, rows, places, kept
        self.leaf = table.weight[rows].requires_grad_()

    def values(self, start: int, stop: int, rounding: bool) -> Tensor:
        """Concatenated rows of tokens start..stop, `[stop - start, columns * dim]`."""
        leaf = straight_through(self.leaf, "fp8_row") if rounding else self.leaf
        values = F.embedding(self.places[start:stop], leaf)  # [tokens, columns, dim]
        if self.kept is not None:
            values = values * self.kept[start:stop].unsqueeze(-1)
        return values.flatten(1)

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """One step of Adam with decoupled decay for the gathered rows."""
        grad = self.leaf.grad
        if grad is None:
            return
        table, rows = self.table, self.rows
        mean = table.mean[rows].lerp_(grad, 1 - BETAS[0])
        square = table.square[rows].lerp_(grad.square(), 1 - BETAS[1])
        table.mean[rows], table.square[rows] = mean, square
        weight = self.leaf.detach() * (1 - learning_rate * DECAY)
        table.weight[rows] = weight - learning_rate * mean / (square.sqrt() + EPS)
