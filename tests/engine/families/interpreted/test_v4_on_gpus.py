"""V4's recorded step on GPUs in name only, launch by launch in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_recorded_on_gpus.py", allow_module_level=True)

from engine.families.deepseek_v4.family import FAMILY
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.deepseek_v4.on_gpus import V4OnGpus
from engine.families.deepseek_v4.shape import launches_of
from engine.families.loader import open_checkpoint
from memory.planner.launches import HAND_OVERS, V4_STEP
from quant.formats.kv_names import KvFormat
from quant.kernels.cuda.program import GpuProgram
from tests import pretend_gpus as pretend
from tests.engine.families.golden_families import Golden, golden_family
from tests.engine.families.interpreted.decoded import SLOTS, Decoded, budget_on, decoder_of, kernels_on

CONTEXT = 300


def load(
    golden: Golden,
    gpus: Sequence[torch.device],
    gpu_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    dram_bytes: int = 1 << 30,
    kv_format: KvFormat = "float32",
) -> DeepseekV4:
    budget = budget_on(gpus, gpu_bytes, dram_bytes, CONTEXT, kv_format)
    model = FAMILY.load(open_checkpoint(golden.path), kernels_on(gpus), budget)
    store = model.weights.experts
    monkeypatch.setattr(store, "outputs", pretend.on_any_thread(store.outputs))
    return model


@pytest.mark.parametrize(
    ("count", "gpu", "dram"),
    [
        pytest.param(1, 256 << 20, 1 << 30, id="everything on one GPU"),
        pytest.param(2, 10_500_000, 2_800_000, id="on two GPUs and the processor"),
    ],
)
def test_replayed_steps_give_the_golden_logits(
    gpus: tuple[torch.device, torch.device],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    gpu: int,
    dram: int,
) -> None:
    """Past windows, groups of four and one of 128, with slots at different places and dead rows."""
    golden = golden_family("deepseek_v4")
    model = load(golden, gpus[:count], gpu, monkeypatch, dram)
    golden_text = Decoded(model, CONTEXT, golden.ids(), golden.logits())
    assert isinstance(decoder_of(golden_text.replayed), V4OnGpus)
    layers = {str(device) for device in model.weights.places.layers}
    experts = {tier for layer in model.expert_tiers() for tier in layer}
    assert layers == ({"gpu:0"} if count == 1 else {"gpu:0", "gpu:1", "cpu"})
    assert experts == ({"vram:0"} if count == 1 else {"vram:0", "vram:1"})
    for counts in ({0: 126}, {1: 6}, {0: 1}, {0: 1, 1: 1, 2: 1}):
        golden_text.step(counts)
    model.close()


def test_encoded_caches_are_written_and_read_by_replayed_steps(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With index keys turned by a Hadamard matrix."""
    golden = golden_family("deepseek_v4")
    model = load(golden, gpus[:1], 256 << 20, monkeypatch, kv_format="vendor")
    golden_text = Decoded(model, CONTEXT, golden.ids(), golden.logits(), is_golden=False)
    assert isinstance(decoder_of(golden_text.replayed), V4OnGpus)
    for count in (127, 1):
        golden_text.step_of_encoded({0: count})
    model.close()


@pytest.mark.parametrize("kv_format", ["float32", "bf16", "vendor"])
def test_a_layer_launches_what_a_plan_counts_with_and_hands_over_once(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch, kv_format: KvFormat
) -> None:
    """Windows alone, entries of four tokens that an indexer chooses among, and of 128, all of which are
    seen."""
    model = load(golden_family("deepseek_v4"), gpus[:1], 256 << 20, monkeypatch, kv_format=kv_format)
    decoder = model.new_cache(SLOTS, CONTEXT).decoder
    assert isinstance(decoder, V4OnGpus)
    (stay,) = decoder.step.stays
    assert isinstance(stay.program, GpuProgram)
    for layer in range(model.config.layers):
        planned = launches_of(model.config, layer, CONTEXT, model.cache_shape.rows)
        assert stay.program.launches(layer) == planned <= 30, layer
        assert stay.program.hand_overs(layer) == HAND_OVERS
    assert stay.program.launches(None) == V4_STEP
    model.close()
