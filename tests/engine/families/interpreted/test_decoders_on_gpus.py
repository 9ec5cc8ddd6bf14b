"""Recorded steps of families that keep keys and values, on GPUs in name only, in Triton's interpreter: the
golden logits, and those of operations in torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_recorded_on_gpus.py", allow_module_level=True)

from engine.families.base import KvCache
from engine.families.decoder.forward import Decoder
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from memory.planner.launches import HELD
from memory.planner.shape import ModelShape
from quant.formats.kv_names import KvFormat
from quant.kernels.cuda.program import GpuProgram
from tests import pretend_gpus as pretend
from tests.engine.families.golden_families import golden_family
from tests.engine.families.interpreted.decoded import Decoded, budget_on, decoder_of, kernels_on

CONTEXT = 96
PLENTY = 256 << 20  # of a GPU


def load(
    name: str,
    gpus: Sequence[torch.device],
    gpu_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    dram_bytes: int = 1 << 30,
    experts: str | None = None,
    kv_format: KvFormat = "float32",
) -> Decoder:
    checkpoint = open_checkpoint(golden_family(name).path)
    if experts is not None:
        checkpoint = family_of(checkpoint).reencoded(checkpoint, experts)
    budget = budget_on(gpus, gpu_bytes, dram_bytes, CONTEXT, kv_format)
    model = family_of(checkpoint).load(checkpoint, kernels_on(gpus), budget)
    assert isinstance(model, Decoder)
    if (store := model.weights.experts) is not None:
        monkeypatch.setattr(store, "outputs", pretend.on_any_thread(store.outputs))
    return model


def decoded(model: Decoder, name: str, *, is_golden: bool = True) -> Decoded:
    golden = golden_family(name)
    return Decoded(model, CONTEXT, golden.ids(), golden.logits(), is_golden)


@pytest.mark.parametrize(
    "name",
    ["mixtral", "qwen3_moe", "olmoe", "qwen3_moe_fp8", "granitemoe", "glm4_moe", "minimax_m2", "gpt_oss"],
)
def test_replayed_steps_give_the_golden_logits(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With experts of gpt-oss on the GPU, and those in bfloat16 and FP8 left to the processor."""
    model = load(name, gpus[:1], PLENTY, monkeypatch)
    golden_text = decoded(model, name)
    assert {stay.recorder.device for stay in decoder_of(golden_text.replayed).step.stays} == set(gpus[:1])
    golden_text.step({0: 40})
    golden_text.step({2: 7})
    golden_text.step({1: 1, 2: 1, 0: 1})  # a number of rows that there are no launches for
    golden_text.step({0: 1})
    counts = launches_of(golden_text.replayed, model)
    planned = [layer.launches for layer in loaded_shape(name).layers]
    assert counts[1:] == planned[1:]
    assert counts[0] - (planned[0] or 0) in (0, 1)  # the first norm, which may go along with rotations
    model.close()


def loaded_shape(name: str) -> ModelShape:
    checkpoint = open_checkpoint(golden_family(name).path)
    return family_of(checkpoint).loaded_shape(checkpoint)


def launches_of(cache: KvCache, model: Decoder) -> list[int]:
    """Those of each layer on one GPU, as if it held the experts."""
    (stay,) = decoder_of(cache).step.stays
    assert isinstance(stay.program, GpuProgram)
    assert model.weights.experts is not None
    counts = [stay.program.launches(n) for n in range(len(model.weights.layers))]
    if not model.weights.experts.on_gpus:
        for n in model.description.expert_layers:
            counts[n] += HELD
    return counts


@pytest.mark.parametrize(
    ("name", "experts", "count", "gpu_bytes", "dram_bytes", "tiers"),
    [
        pytest.param("mixtral", "mxfp4", 1, 1_350_000, 350_000, {"vram:0", "dram", "nvme"}, id="on disk"),
        pytest.param("qwen3_moe_fp8", "int4", 2, PLENTY, 1 << 30, {"vram:0", "vram:1"}, id="on two GPUs"),
        pytest.param("gpt_oss", None, 2, 1_650_000, 1 << 30, {"vram:0", "vram:1", "dram"}, id="in DRAM"),
    ],
)
def test_experts_are_computed_where_they_are(
    gpus: tuple[torch.device, torch.device],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    experts: str | None,
    count: int,
    gpu_bytes: int,
    dram_bytes: int,
    tiers: set[str],
) -> None:
    """Re-encoded ones give other numbers than the golden ones."""
    model = load(name, gpus[:count], gpu_bytes, monkeypatch, dram_bytes, experts)
    golden_text = decoded(model, name, is_golden=experts is None)
    assert {tier for layer in model.expert_tiers() for tier in layer} == tiers
    for counts in ({0: 40}, {0: 1, 1: 1}, {0: 1}):
        golden_text.step(counts)
    model.close()
