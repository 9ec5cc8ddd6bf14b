"""V4.1's recorded step on GPUs in name only, its kernels in Triton's interpreter, against operations in
torch.

What a CUDA graph would do is done here launch by launch: the same launches with the same arguments, again and
again, while tokens, slots, positions and the number of rows change.
"""

from __future__ import annotations

import gc
import os
import re
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_recorded_on_gpus.py", allow_module_level=True)

from safetensors.torch import load_file

from engine.families import places
from engine.families.base import Batch
from engine.families.deepseek_v41.forward import DeepseekV41, V41Cache
from engine.families.on_gpus import stays, step
from engine.families.registry import family_of
from engine.warm_up import warm_up
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.launches import HAND_OVERS, SHARE, STEP, gpu_launches
from quant.errors import BudgetError
from quant.formats.kv_names import KvFormat
from quant.kernels.cuda.helper import comes_true
from quant.kernels.cuda.mailbox import StalledError
from quant.kernels.cuda.program import GpuProgram, Segment
from tests import pretend_gpus as pretend
from tests.conftest import golden_path
from tests.engine.families.interpreted.decoded import SLOTS, Decoded, budget_on, decoder_of, kernels_on

CONTEXT = 300


def load(
    name: str,
    gpus: Sequence[torch.device],
    gpu_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    dram_bytes: int = 1 << 30,
    kv_format: KvFormat = "float32",
) -> DeepseekV41:
    checkpoint = open_safetensors(golden_path(name))
    budget = budget_on(gpus, gpu_bytes, dram_bytes, CONTEXT, kv_format)
    model = family_of(checkpoint).load(checkpoint, kernels_on(gpus), budget)
    assert isinstance(model, DeepseekV41)
    store = model.weights.experts
    monkeypatch.setattr(store, "outputs", pretend.on_any_thread(store.outputs))
    return model


def decoded(model: DeepseekV41, name: str, *, is_golden: bool = True) -> Decoded:
    golden = load_file(golden_path(name) / "expected.safetensors")
    return Decoded(model, CONTEXT, golden["input_ids"].tolist(), golden["logits"], is_golden)


@pytest.mark.parametrize(
    ("name", "count", "gpu_bytes"),
    [
        pytest.param("v41-a", 2, 24 << 20, id="v41-a on two GPUs"),
        pytest.param("v41-b", 2, 32 << 20, id="v41-b on two GPUs"),
        pytest.param("v41-c", 1, 16 << 20, id="v41-c on one"),
    ],
)
def test_replayed_steps_give_the_golden_logits(
    gpus: tuple[torch.device, torch.device],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    count: int,
    gpu_bytes: int,
) -> None:
    model = load(name, gpus[:count], gpu_bytes, monkeypatch)
    golden_text = decoded(model, name)
    assert {stay.recorder.device for stay in decoder_of(golden_text.replayed).step.stays} == set(gpus[:count])
    golden_text.step({0: 45})
    golden_text.step({2: 7})
    golden_text.step({2: 1})
    golden_text.step({1: 1, 2: 1, 0: 1})  # a number of rows that there are no launches for
    model.close()


def test_encoded_caches_are_written_and_read_by_replayed_steps(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("v41-c", gpus[:1], 16 << 20, monkeypatch, kv_format="vendor")
    golden_text = decoded(model, "v41-c", is_golden=False)
    for counts in ({0: 45}, {2: 7}, {2: 1}, {1: 1, 2: 1, 0: 1}):
        golden_text.step_of_encoded(counts)
    model.close()


def test_layers_on_a_gpu_and_on_the_processor_with_experts_read_from_disk(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("v41-a", gpus[:1], 16 << 20, monkeypatch, 1_300_000)
    golden_text = decoded(model, "v41-a")
    devices = {stay.recorder.device.type for stay in decoder_of(golden_text.replayed).step.stays}
    assert devices == {"gpu", "cpu"}
    assert any(tier == "nvme" for layer in model.expert_tiers() for tier in layer)
    golden_text.step({0: 40})
    golden_text.step({0: 1})
    model.close()


def test_buffers_that_have_no_room_are_refused_with_the_bytes_that_are_missing(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "recorded_bytes", lambda shape, workload: 200_000)
    model = load("v41-c", gpus[:1], 16 << 20, monkeypatch)
    with pytest.raises(BudgetError, match=r"of 16 sequences of up to 300 tokens .*--max-model-len") as caught:
        model.new_cache(SLOTS, CONTEXT)
    needed, missing = (float(number) for number in re.findall(r"([\d.]+) MB", str(caught.value)))
    assert needed - missing == pytest.approx(0.2)
    model.close()


def test_a_gpu_that_does_not_answer_fails_its_step_and_none_after_it_has_ended(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `loci info` counts what each GPU launches, as a plan does."""
    model = load("v41-c", gpus, 16 << 20, monkeypatch)
    golden_text = decoded(model, "v41-c")
    parts = golden_text.replayed.step_parts
    assert {work.launches for part in parts if part.helps for work in part.layers} == {SHARE}
    own = [work for part in parts if not part.helps for work in part.layers if work.exchanges]
    assert sorted(work.layer or 0 for work in own) == list(range(model.config.num_hidden_layers))
    assert all(17 <= (work.launches or 0) <= 21 and work.exchanges == 1 for work in own)
    assert sorted({(part.device, part.helps) for part in parts}, key=str) == [
        ("gpu:0", "gpu:1"), ("gpu:0", None), ("gpu:1", "gpu:0"), ("gpu:1", None),
    ]  # fmt: skip

    helper = decoder_of(golden_text.replayed).step.stays[0].helping[0].helper
    coordinator = model._coordinator
    assert helper is not None
    assert coordinator is not None
    may_go_on = threading.Event()
    monkeypatch.setattr(step, "GRACE_S", 0.1)
    monkeypatch.setattr(stays, "GRACE_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(coordinator, "_patience_s", 0.1)
        patch.setattr(helper.program, "start", lambda rows: may_go_on.wait(60))
        model.forward(Batch.of([(1, 0, [3, 4])]), golden_text.replayed)
        with pytest.raises(StalledError, match="no answer from gpu:1"):
            model.forward(Batch.of([(1, 2, [5])]), golden_text.replayed)
        with pytest.raises(StalledError, match="gpu:1 has not come to the end"):
            model.forward(Batch.of([(2, 0, [3, 4])]), golden_text.replayed)  # a prompt, too
    assert not model.weights.experts.slots.claims
    may_go_on.set()
    assert comes_true(helper.is_done, 5)
    golden_text.step({0: 9})
    golden_text.step({0: 1})
    model.close()


def test_warming_up_leaves_no_cache_behind(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan has memory for one, and Python may collect nothing for a long time."""
    model = load("v41-c", gpus, 16 << 20, monkeypatch)
    made: list[weakref.ref[V41Cache]] = []

    def new_cache(slots: int, capacity: int) -> V41Cache:
        cache = DeepseekV41.new_cache(model, slots, capacity)
        assert isinstance(decoder_of(cache).step.stays[0].program, GpuProgram)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model, "new_cache", new_cache)
    gc.disable()
    try:
        warm_up(model, 20, (20,))  # a prompt: the interpreter takes minutes for steps
        left = [cache() for cache in made]
    finally:
        gc.enable()
    assert left == [None]
    model.close()


def test_nothing_is_asked_of_the_host_between_hand_overs(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sizes, no values, no memory: neither while operations are noted nor while they run."""
    model = load("v41-c", gpus[:1], 16 << 20, monkeypatch)
    run, operation, here = Segment.run, pretend._run, threading.get_ident()
    inside: list[bool] = []
    asked: list[str] = []

    def watched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        is_answer = threading.get_ident() != here  # of the coordinator, at the same time
        if not is_answer and (func is torch.ops.aten._local_scalar_dense.default or inside):
            asked.append(str(func))
        return operation(func, args, kwargs)

    def alone(segment: Segment) -> None:
        inside.append(True)
        run(segment)
        inside.clear()

    monkeypatch.setattr(pretend, "_run", watched)
    monkeypatch.setattr(Segment, "run", alone)
    cache = model.new_cache(1, 8)
    model.forward(Batch.of([(0, 0, [3])]), cache)
    assert asked == []
    programs = [stay.program for stay in decoder_of(cache).step.stays]
    assert all(isinstance(program, GpuProgram) for program in programs)
    model.close()


def test_a_layer_launches_what_a_plan_counts_with_and_hands_over_once(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """v41-a has every kind of layer that V4.1 has."""
    model = load("v41-a", gpus[:1], 40 << 20, monkeypatch)
    cache = model.new_cache(SLOTS, CONTEXT)
    (stay,) = decoder_of(cache).step.stays
    assert isinstance(stay.program, GpuProgram)
    c = model.config
    for layer in range(c.num_hidden_layers):
        planned = gpu_launches(
            owns_entries=layer in c.kv_source_layer_ids,
            chooses_among=CONTEXT if layer in c.index_source_layer_ids else 0,
            has_table=layer in c.engram_layer_ids,
        )
        shared = 1 if layer == 0 else 0  # the rotations of all layers
        assert stay.program.launches(layer) - shared == planned <= 21, layer
        assert stay.program.hand_overs(layer) == HAND_OVERS + (layer + 1 in c.engram_layer_ids)
    assert stay.program.launches(None) + 1 == STEP
    model.close()
