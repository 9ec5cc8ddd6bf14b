"""What a layer of V4.1 takes on a GPU at its published widths: launches, and bytes of buffers. Nothing is
run."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from memory.planner.launches import CHOICE, CHUNK, CHUNKS, SHARE, beside
from memory.planner.placement import Workload
from memory.planner.published import built_in
from memory.planner.workspace import recorded_bytes
from quant.kernels.cuda.program import arranged
from quant.kernels.cuda.schedule import LAUNCHES
from tests.quant.kernels.step_launches import Layer, shared_groups


def choices(entries: int) -> list[int]:
    """Launches of each choice among so many entries."""
    groups = Layer(entries).groups()
    found = []
    for group in groups:
        (first, *_) = group
        if first.kind == "select":
            found.append(2 + (first.ins["best"] is not None))
    return found


def test_more_entries_than_one_program_looks_at_take_one_launch_more() -> None:
    assert choices(CHUNK)[0] == CHOICE
    assert choices(CHUNK + 1)[0] == CHOICE + CHUNKS


def test_the_processor_is_asked_before_the_shared_expert_and_those_that_the_gpu_holds() -> None:
    firsts = [group[0] for group in Layer().groups()]
    mailed = next(at for at, op in enumerate(firsts) if op.is_mailed)
    awaited = next(at for at, op in enumerate(firsts) if op.kind == "await")
    kinds = [op.kind for op in firsts[mailed + 1 : awaited]]
    assert sorted(kinds) == ["experts", "product", "product"]
    assert sum(LAUNCHES.get(kind, 1) for kind in kinds) == beside(has_shared=True)


def test_another_gpu_waits_fetches_computes_and_answers() -> None:
    kinds = [op.kind for group in shared_groups() for op in group]
    assert kinds == ["called", "fetch", "experts", "reply"]
    assert sum(LAUNCHES.get(kind, 1) for kind in kinds) == SHARE


def test_a_plan_keeps_room_for_the_buffers_of_a_recorded_step() -> None:
    context = 131072
    layer = Layer(context // 2)
    layer.groups()
    noted, kept = layer.recorder._noted, layer.recorder._kept
    used = arranged(noted, kept, 16)[1]
    planned = recorded_bytes(built_in("deepseek-v4.1-flash"), Workload(context=context, sequences=1))
    assert used <= planned <= 4 * used
