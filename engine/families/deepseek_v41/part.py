"""Where V4.1 may be cut into parts, and the config of a part.

A layer reads compressed entries of an earlier one, and entries that an earlier one has chosen. A cut is
between layers of which no later one looks back across it: then nothing but the streams, and the mix that they
are read with, passes.
"""

from __future__ import annotations

from dataclasses import replace

from engine.families.deepseek_v41.config import V41Config
from memory.checkpoint.part import Span


def cuts(c: V41Config) -> tuple[int, ...]:
    """The layers before which the model may be cut."""
    layers = range(c.num_hidden_layers)
    return tuple(n for n in layers[1:] if all(_looks_back_to(c, layer) >= n for layer in layers[n:]))


def _looks_back_to(c: V41Config, layer: int) -> int:
    """The first layer whose entries or choice this one uses; itself where it uses none."""
    source = c.kv_source_of(layer)
    if source is None:
        return layer
    chooser = max(n for n in c.index_source_layer_ids if n <= layer)
    candidate = c.candidate_source_layer_id
    makes_use = layer == chooser and 0 <= candidate <= layer
    return min(source, chooser, candidate if makes_use else layer)


def config_of(c: V41Config, span: Span) -> V41Config:
    """The config of a part: its layers are numbered from 0, and nothing is drafted."""

    def inside(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n - span.first for n in layers if span.first <= n < span.stop)

    candidate = inside((c.candidate_source_layer_id,))
    tables = zip(c.engram_layer_ids, c.engram_num_embeddings, strict=True)
    return replace(
        c,
        num_hidden_layers=span.stop - span.first,
        compress_ratios=c.compress_ratios[span.first : span.stop],
        kv_source_layer_ids=inside(c.kv_source_layer_ids),
        index_source_layer_ids=inside(c.index_source_layer_ids),
        candidate_source_layer_id=candidate[0] if candidate else -1,
        engram_layer_ids=inside(c.engram_layer_ids),
        engram_num_embeddings=tuple(rows for n, rows in tables if span.first <= n < span.stop),
        dspark=None,
        is_first=span.is_first,
        is_last=span.is_last,
    )
