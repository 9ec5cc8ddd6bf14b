"""Recorded decode steps on a real GPU: graphs against operations one by one, launch times, words on streams.

Nothing here passes by falling back: that steps were captured, and that the stream waits for words itself, is
asserted.
"""

from __future__ import annotations

import logging
import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from safetensors.torch import load_file

from engine.families.base import Batch
from engine.families.deepseek_v41.forward import DeepseekV41, V41Cache
from engine.families.deepseek_v41.on_gpus import V41OnGpus
from engine.families.loader import load
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.placing import GPU_BASE_BYTES
from memory.tiers import Tier
from quant.kernels.cuda.mailbox import Mailbox, has_stream_words
from quant.kernels.cuda.program import GpuProgram
from tests.conftest import golden_path

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
TOLERANCE = 1e-3  # sums in another order, in three TF32 passes where tensor cores work
SLOTS, CONTEXT = 16, 300


def model_on_gpu(gpu_bytes: int, dram_bytes: int = 1 << 30, gpus: int = 1) -> DeepseekV41:
    tiers = tuple(Tier(f"vram:{n}", GPU_BASE_BYTES + gpu_bytes, torch.device("cuda", n)) for n in range(gpus))
    budget = MemoryBudget(dram_bytes, tiers, Workload(context=CONTEXT, sequences=SLOTS, prefill_chunk=64))
    model = load(golden_path("v41-a"), budget).model
    assert isinstance(model, DeepseekV41)
    return model


def tiers_of_experts(model: DeepseekV41) -> set[str]:
    return {tier for layer in model.expert_tiers() for tier in layer}


def programs_of(cache: V41Cache) -> list[GpuProgram]:
    assert isinstance(cache.decoder, V41OnGpus), "nothing was recorded"
    found = [stay.program for stay in cache.decoder.step.stays]
    on_gpu = [program for program in found if isinstance(program, GpuProgram)]
    assert on_gpu
    return on_gpu


# Sixteen sequences take 129 MiB in pages of 2 MiB.
@pytest.mark.parametrize(
    ("gpu_bytes", "dram_bytes", "tiers"),
    [
        pytest.param(192 << 20, 1 << 30, {"vram:0"}, id="everything on the GPU"),
        pytest.param(133 << 20, 1 << 30, {"vram:0", "dram"}, id="some experts in DRAM"),
        pytest.param(133 << 20, 1_300_000, {"vram:0", "dram", "nvme"}, id="some on disk"),
    ],
)
def test_captured_steps_give_the_golden_logits(
    gpu_bytes: int, dram_bytes: int, tiers: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    golden = load_file(golden_path("v41-a") / "expected.safetensors")
    ids = golden["input_ids"].tolist()
    with caplog.at_level(logging.WARNING):
        model = model_on_gpu(gpu_bytes, dram_bytes)
        assert {layer.device for layer in model.weights.layers} == {GPU}
        assert tiers_of_experts(model) == tiers
        replayed, eager = model.new_cache(SLOTS, CONTEXT), model.new_cache(SLOTS, CONTEXT)
    assert "captured" not in caplog.text
    assert all(program.is_captured for program in programs_of(replayed))
    eager.decoder = None
    for slot in range(SLOTS):
        for cache in (replayed, eager):
            model.forward(Batch.of([(slot, 0, ids[: 30 + slot])]), cache)
    for step in range(40):
        slots = [slot for slot in range(SLOTS) if step % (slot + 1) == 0] if step % 7 else list(range(SLOTS))
        parts = [(slot, at := replayed.length(slot), ids[at : at + 1]) for slot in slots]
        first, second = (model.forward(Batch.of(parts), cache) for cache in (replayed, eager))
        assert (first - second).abs().max() < TOLERANCE
        assert (first - golden["logits"][[at for _, at, _ in parts]]).abs().max() < TOLERANCE
    model.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    ("gpu_bytes", "tiers"),
    [
        pytest.param(70 << 20, {"vram:0", "vram:1"}, id="experts on both GPUs"),
        pytest.param(135 << 19, {"vram:0", "vram:1", "dram"}, id="and in DRAM"),
    ],
)
def test_two_gpus_compute_a_layers_experts_at_once(gpu_bytes: int, tiers: set[str]) -> None:
    golden = load_file(golden_path("v41-a") / "expected.safetensors")
    ids = golden["input_ids"].tolist()
    model = model_on_gpu(gpu_bytes, 1_900_000, gpus=2)
    assert {layer.device for layer in model.weights.layers} == {GPU, torch.device("cuda", 1)}
    assert tiers_of_experts(model) == tiers
    cache = model.new_cache(SLOTS, CONTEXT)
    assert isinstance(cache.decoder, V41OnGpus), "nothing was recorded"
    helpers = [helping.helper for stay in cache.decoder.step.stays for helping in stay.helping]
    assert {helper.device.index for helper in helpers if helper is not None} == {0, 1}
    for helper in helpers:
        assert helper is not None
        assert helper.program.is_captured
        assert helper.program.runs_alone, "its stream cannot wait for words by itself"
    model.forward(Batch.of([(0, 0, ids[:30]), (1, 0, ids[:20])]), cache)
    for at in range(30, 90):
        parts = [(0, at, ids[at : at + 1]), (1, at - 10, ids[at - 10 : at - 9])]
        logits = model.forward(Batch.of(parts), cache)
        assert (logits - golden["logits"][[at, at - 10]]).abs().max() < TOLERANCE
    computed = model.weights.experts.telemetry.snapshot().computed
    assert min(computed["vram:0"], computed["vram:1"]) > 0
    model.close()


def test_the_host_does_not_start_a_layers_kernels() -> None:
    """A replayed step of v41-a, eight layers, in far less than its 150 launches would take from Python."""
    model = model_on_gpu(192 << 20)
    assert {layer.device for layer in model.weights.layers} == {GPU}
    cache = model.new_cache(1, CONTEXT)
    model.forward(Batch.of([(0, 0, [3, 4, 5])]), cache)
    for at in range(3, 13):
        model.forward(Batch.of([(0, at, [at])]), cache)
    begun = time.perf_counter()
    for at in range(13, 113):
        model.forward(Batch.of([(0, at, [at])]), cache)
    seconds = (time.perf_counter() - begun) / 100
    launches = sum(program.launches(layer) for program in programs_of(cache) for layer in [None, *range(8)])
    model.close()
    print(f"{seconds * 1e3:.2f} ms a step, {launches} launches, {seconds / launches * 1e6:.1f} us each")
    assert seconds < launches * 15e-6


def test_a_stream_sets_a_word_and_waits_for_another_in_a_graph() -> None:
    assert has_stream_words(GPU), "install cuda-bindings for the version of your CUDA"
    box = Mailbox(2, 1, 1, 8, pinned=True)
    before, after = torch.zeros(1, device=GPU), torch.zeros(1, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before += 1
        for word in (box.post_word(1), *box.await_words(1)):
            word.on_stream(GPU)
        after += 1
    for turn in (1, 2, 3):
        box.begin()
        graph.replay()
        deadline = time.monotonic() + 5
        while not box.is_posted(1):
            assert time.monotonic() < deadline
        time.sleep(0.01)
        assert not torch.cuda.current_stream().query()
        box.answer(1)
        torch.cuda.synchronize()
        assert (before.item(), after.item()) == (turn, turn)
        assert not box.is_posted(0)
