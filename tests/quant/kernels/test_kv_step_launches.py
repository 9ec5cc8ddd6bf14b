"""What a layer with keys and values takes on a GPU at published widths: launches, and bytes of buffers.
Nothing is run."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from memory.planner.launches import beside, kv_launches
from memory.planner.placement import Workload
from memory.planner.shape import KvShape, LayerShape, ModelShape, Weights
from memory.planner.workspace import recorded_bytes
from quant.formats.kv_names import KvFormat
from quant.kernels.cuda.program import arranged
from quant.kernels.cuda.schedule import LAUNCHES
from tests.quant.kernels.kv_step_launches import MODELS, KvLayer, Widths

VOCABULARY = 150_000


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv_format", ["float32", "fp8"])
def test_a_layer_launches_what_a_plan_counts_with(name: str, kv_format: KvFormat) -> None:
    widths = MODELS[name]
    groups = KvLayer(widths, kv_format).groups()
    count = sum(LAUNCHES.get(group[0].kind, 1) for group in groups)
    before = 1 if widths.hidden <= 4096 else 2  # rotations and the first norm
    planned = kv_launches(has_experts=True, has_shared=widths.has_shared, is_encoded=kv_format != "float32")
    assert count - before - 1 == planned <= 15  # the head is the last one


@pytest.mark.parametrize("name", MODELS)
def test_others_are_asked_before_what_the_gpu_itself_computes(name: str) -> None:
    firsts = [group[0] for group in KvLayer(MODELS[name]).groups()]
    mailed = next(at for at, op in enumerate(firsts) if op.is_mailed)
    awaited = next(at for at, op in enumerate(firsts) if op.kind == "await")
    kinds = [op.kind for op in firsts[mailed + 1 : awaited]]
    assert sum(LAUNCHES.get(kind, 1) for kind in kinds) == beside(has_shared=MODELS[name].has_shared)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_keeps_room_for_the_buffers_of_a_recorded_step(name: str) -> None:
    layer = KvLayer(MODELS[name])
    layer.groups()
    used = arranged(layer.recorder._noted, layer.recorder._kept, 16)[1]
    planned = recorded_bytes(shape_of(MODELS[name]), Workload(context=MODELS[name].context, sequences=1))
    assert used <= planned <= 4 * used


def shape_of(w: Widths) -> ModelShape:
    """The shape as a description of such a model gives it, as far as buffers depend on it."""
    kv = KvShape(seen_ratio=1, selected=w.window, selected_flops=4 * w.heads * w.dim)
    expert = Weights(0, 3 * w.hidden * w.width)
    layer = LayerShape(Weights(), kv, experts=w.experts, expert=expert)
    in_hand = 4 * (2 * w.hidden + 2 * w.heads * w.dim + 2 * w.width * w.rule.top_k)
    return ModelShape(
        "described", VOCABULARY, w.hidden, w.context, w.rule.top_k, Weights(), Weights(), (layer,), in_hand
    )
