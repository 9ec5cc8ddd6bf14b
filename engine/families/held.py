"""What a loaded model's weights take in memory: counted from the tensors themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Protocol

import torch

from engine.families.places import DensePlaces
from memory.experts.store import ExpertStore
from quant.packed import PackedTensor


def tensors_in(weights: object) -> Iterator[torch.Tensor | PackedTensor]:
    """The tensors in a dataclass of weights."""
    if isinstance(weights, torch.Tensor | PackedTensor):
        yield weights
    elif isinstance(weights, tuple):
        for part in weights:
            yield from tensors_in(part)
    elif is_dataclass(weights):
        for field in fields(weights):
            yield from tensors_in(getattr(weights, field.name))


class Weights(Protocol):
    """Weights of any family: what makes logits, and layers."""

    @property
    def embed(self) -> object: ...
    @property
    def head(self) -> object: ...
    @property
    def layers(self) -> Iterable[object]: ...
    @property
    def places(self) -> DensePlaces: ...


def dense_bytes(weights: Weights, beside_head: Iterable[object], in_dram: Iterable[object]) -> dict[str, int]:
    """Bytes by tier of what every token reads.

    beside_head  what lies with the head
    in_dram      parts of layers that are in DRAM wherever the layers are
    """
    places = weights.places
    on_host = {id(tensor) for part in in_dram for tensor in tensors_in(part)}
    found: dict[str, int] = defaultdict(int)
    for part in (weights.head, *beside_head):
        found[places.head_tier] += sum(tensor.nbytes for tensor in tensors_in(part))
    if weights.embed is not weights.head:  # else tied; and one that stays in its file has no tensors
        found["dram"] += sum(tensor.nbytes for tensor in tensors_in(weights.embed))
    for tier, layer in zip(places.tiers, weights.layers, strict=True):
        for tensor in tensors_in(layer):
            found["dram" if id(tensor) in on_host else tier] += tensor.nbytes
    return dict(found)


def by_part(dense: dict[str, int], experts: ExpertStore | None) -> dict[str, dict[str, int]]:
    """Bytes by tier and part: of what every token reads, and of experts' slots."""
    slots = {} if experts is None else experts.tier_bytes
    found: dict[str, dict[str, int]] = {}
    for tier in dict.fromkeys(("dram", *dense, *slots)):
        parts = {"dense": dense.get(tier, 0), "experts": slots.get(tier, 0)}
        found[tier] = {part: nbytes for part, nbytes in parts.items() if nbytes}
    return found
