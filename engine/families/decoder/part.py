"""Where decoders may be cut into parts, and the description of a part."""

from __future__ import annotations

from dataclasses import replace

from engine.families.decoder.description import DeltaNet, Description, Mla
from memory.checkpoint.part import Span


def cuts(d: Description) -> tuple[int, ...]:
    """The layers before which the model may be cut: nothing but the hidden state passes there."""
    return tuple(n for n in range(1, len(d.layers)) if _may_cut(d, n))


def _may_cut(d: Description, n: int) -> bool:
    # A layer without an indexer of its own attends to what the last one before it has chosen.
    of_indexers = [a for layer in d.layers[n:] if isinstance(a := layer.attention, Mla) and a.indexer]
    if of_indexers and of_indexers[0].own_indexer is None:
        return False
    # Attention says how positions are turned, so each part has some: what is between two cuts ends with it.
    has_attention = any(not isinstance(layer.attention, DeltaNet) for layer in d.layers[n:])
    return has_attention and not isinstance(d.layers[n - 1].attention, DeltaNet)


def description_of(d: Description, span: Span) -> Description:
    """The description of a part, whose layers are numbered from 0."""
    return replace(
        d,
        layers=d.layers[span.first : span.stop],
        is_tied=d.is_tied and span.is_last,
        is_first=span.is_first,
        is_last=span.is_last,
    )


def outside(d: Description, span: Span) -> list[str]:
    """Names, without endings, of what a part has beside its layers."""
    roles = ["rope_factors"] if d.has_rope_factors else []
    if span.is_first or (span.is_last and d.is_tied):
        roles.append("embed")
    if span.is_last:
        roles += ["norm"] if d.is_tied else ["norm", "head"]
    return [d.names[role].removesuffix(".weight") for role in roles]
