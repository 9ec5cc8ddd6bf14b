"""A recorded step's report names every operation once, and puts equal layers together."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.embedded import model_path
from engine.families.loader import load
from engine.program_report import LayerKind, LayerWork, StepPart, layer_kinds, operation_kinds
from memory.planner.budget import MemoryBudget
from quant.kernels.cpu import library
from quant.kernels.cpu.program import Program

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")


def program(budget: MemoryBudget) -> Program:
    model = load(model_path(Path("demo")), budget).model
    recorded = model.new_cache(1, 16).program
    model.close()
    assert recorded is not None
    return recorded


@pytest.fixture(scope="module")
def still() -> Program:
    return program(MemoryBudget(1 << 30))


def test_kinds_and_layers_are_two_views_of_the_same_operations(still: Program) -> None:
    kinds, layers = operation_kinds(still), layer_kinds(still)

    assert sum(kind.count for kind in kinds) == len(still.noted)
    assert sum(len(each.layers) * (each.operations + each.hand_overs) for each in layers) == len(still.noted)
    assert sum(kind.nbytes for kind in kinds) == sum(len(each.layers) * each.nbytes for each in layers)
    assert [kind.nbytes for kind in kinds] == sorted((kind.nbytes for kind in kinds), reverse=True)


def test_where_all_is_in_memory_nothing_is_handed_over(still: Program) -> None:
    assert not any(each.hand_overs for each in layer_kinds(still))


def test_where_experts_move_every_layer_may_hand_over() -> None:
    moving = program(MemoryBudget(9 << 20))

    assert all(each.hand_overs >= 2 for each in layer_kinds(moving) if each.layers != (None,))


def test_a_devices_equal_layers_are_reported_together() -> None:
    work = [LayerWork(None, 1), *(LayerWork(n, 18 if n == 2 else 17, 1, 1) for n in range(4))]
    found = StepPart("cuda:0", None, tuple(work)).kinds()
    assert [(name, each.launches, each.exchanges) for name, each in found] == [
        ("0 to 1, 3", 17, 1), ("2", 18, 1), ("before and after", 1, 0),
    ]  # fmt: skip


def test_layers_are_named_in_ranges() -> None:
    assert LayerKind((0, 1, 2, 5), 1, 0, 0).name == "0 to 2, 5"
    assert LayerKind((None,), 1, 0, 0).name == "before and after"
