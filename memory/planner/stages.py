"""Which layers go to which of several machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from memory.checkpoint.part import Span
from memory.planner.shape import ModelShape, Weights
from quant.errors import ConfigError


def spread(shape: ModelShape, cuts: Sequence[int], rooms: Sequence[float]) -> list[Span]:
    """Consecutive layers for each machine, in order: the fullest one, by its room, is as empty as can be.

    rooms  of each machine, in any unit. Raises ConfigError where the model cannot be cut into so many parts.
    """
    layers, stages = len(shape.layers), len(rooms)
    if stages > len(cuts) + 1:
        most = "it cannot be cut" if not cuts else f"it can be cut into {len(cuts) + 1}"
        raise ConfigError(f"{shape.name} does not go on {stages} stages: {most}; lower --stages")
    before = [0]
    for n in range(layers):
        before.append(before[-1] + _bytes_of(shape, n))
    ends = [0, *sorted(cuts), layers]
    # best[i]: the fullest so far, where the stages before end at ends[i], and where each of them does.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for number, room in enumerate(rooms):
        left = stages - number - 1
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for at, (fullest, chosen) in best.items():
            for to in range(at + 1, len(ends) - left):
                share = (before[ends[to]] - before[ends[at]]) / max(room, 1.0)
                candidate = max(fullest, share), (*chosen, to)
                if candidate < found.get(to, (math.inf, ())):
                    found[to] = candidate
        best = found
    _, chosen = best[len(ends) - 1]
    return Span.between([ends[to] for to in chosen[:-1]], layers)


def part_of(shape: ModelShape, span: Span) -> ModelShape:
    """The shape of some layers, with the embedding at the model's beginning and the head at its end."""
    part = replace(
        shape,
        layers=shape.layers[span.first : span.stop],
        embedding=_embedding(shape, span),
        head=shape.head if span.is_last else Weights(),
        tied=shape.tied if span.is_first and span.is_last else Weights(),
        stored_bytes=0,
    )
    share = part.nbytes / max(1, replace(shape, stored_bytes=0).nbytes)
    return replace(part, stored_bytes=int(shape.stored_bytes * share))


def _embedding(shape: ModelShape, span: Span) -> Weights:
    """What a part has of it: all, where the head that is the same matrix is another part's."""
    if not span.is_first:
        return Weights()
    return shape.embedding if span.is_last else shape.embedding + shape.tied


def _bytes_of(shape: ModelShape, n: int) -> int:
    """Bytes of a layer's weights, with what lies at the model's ends."""
    layer = shape.layers[n]
    nbytes = layer.dense.nbytes + layer.shared.nbytes + layer.experts * layer.expert.nbytes
    nbytes += 0 if layer.table is None else layer.table.nbytes
    nbytes += shape.embedding.nbytes if n == 0 else 0
    return nbytes + (shape.head.nbytes if n == len(shape.layers) - 1 else 0)
