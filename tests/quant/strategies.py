"""Hypothesis strategies for weight matrices."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


@st.composite
def matrices(
    draw: st.DrawFn,
    rows: tuple[int, int] = (1, 4),
    blocks: tuple[int, int] = (1, 3),
    block: int = 128,
    largest: float = 2.0**100,
) -> torch.Tensor:
    """`[rows, blocks * block]` float32: normal values over many magnitudes, with a few chosen ones."""
    shape = (draw(st.integers(*rows)), draw(st.integers(*blocks)) * block)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    values = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-60, 60))
    chosen = draw(st.lists(st.floats(-largest, largest, width=32), max_size=6))
    for value in chosen:
        row, col = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        values[row, col] = value
    return values
