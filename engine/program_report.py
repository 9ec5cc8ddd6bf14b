"""What a recorded decode step consists of: operations, the bytes they read, and where it hands over; or, on
GPUs, what each device launches and waits for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quant.kernels.cpu.program import Noted, Program


@dataclass(frozen=True)
class OperationKind:
    """All operations of a kind, and the bytes of weights that they read for one token."""

    kind: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class LayerKind:
    """Layers that have the same operations (None: what belongs to no layer), each with these numbers."""

    layers: tuple[int | None, ...]
    operations: int
    hand_overs: int
    nbytes: int

    @property
    def name(self) -> str:
        """`0 to 3, 5`, or what is outside all layers."""
        numbers = [layer for layer in self.layers if layer is not None]
        return _ranges(numbers) if numbers else "before and after"


@dataclass(frozen=True)
class LayerWork:
    """What a device does for a layer (None: for none), with these numbers.

    launches   of kernels; None where the device is a processor
    exchanges  answers of other GPUs that it waits for
    """

    layer: int | None
    launches: int | None
    hand_overs: int = 0
    exchanges: int = 0


@dataclass(frozen=True)
class StepPart:
    """A program of a recorded step on several devices.

    helps  the device whose layers' experts it shares; None where it computes layers of its own
    """

    device: str
    helps: str | None
    layers: tuple[LayerWork, ...]

    def kinds(self) -> list[tuple[str, LayerWork]]:
        """Its layers, equal ones together, named; what belongs to none is last."""
        equal: dict[tuple[LayerWork, bool], list[int | None]] = defaultdict(list)
        for work in self.layers:
            equal[replace(work, layer=None), work.layer is None].append(work.layer)
        ordered = sorted(equal.items(), key=lambda of: (of[0][1], of[1][0] or 0))
        return [(LayerKind(tuple(layers), 0, 0, 0).name, work) for (work, _), layers in ordered]


def operation_kinds(program: Program) -> list[OperationKind]:
    """Those of a program, most bytes first."""
    counts = Counter(noted.kind for noted in program.noted)
    nbytes = _sum_by_kind(program.noted)
    kinds = [OperationKind(kind, count, nbytes[kind]) for kind, count in counts.items()]
    return sorted(kinds, key=lambda kind: (-kind.nbytes, -kind.count, kind.kind))


def layer_kinds(program: Program) -> list[LayerKind]:
    """The layers of a program, equal ones together; what belongs to none is last."""
    by_layer: dict[int | None, list[Noted]] = defaultdict(list)
    for noted in program.noted:
        by_layer[noted.layer].append(noted)
    equal: dict[tuple[object, ...], list[int | None]] = defaultdict(list)
    for layer, operations in by_layer.items():
        key = (layer is None, *((noted.kind, noted.bytes_read) for noted in operations))
        equal[key].append(layer)
    found = []
    for layers in equal.values():
        operations = by_layer[layers[0]]
        hand_overs = sum(noted.kind == "hand_over" for noted in operations)
        nbytes = sum(noted.bytes_read for noted in operations)
        found.append(LayerKind(tuple(layers), len(operations) - hand_overs, hand_overs, nbytes))
    return sorted(found, key=lambda kind: (kind.layers[0] is None, kind.layers[0] or 0))


def _sum_by_kind(noted: Sequence[Noted]) -> Counter[str]:
    total: Counter[str] = Counter()
    for operation in noted:
        total[operation.kind] += operation.bytes_read
    return total


def _ranges(numbers: Sequence[int]) -> str:
    """`0 to 3, 5` of ascending numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)
