"""Recorded decode steps of families that keep keys and values on a real GPU, captured as graphs."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from engine.families.base import Batch
from engine.families.decoder.forward import Decoder
from engine.families.decoder.on_gpus import DecoderOnGpus
from engine.families.loader import load
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.placing import GPU_BASE_BYTES
from memory.tiers import Tier
from quant.kernels.cuda.program import GpuProgram
from tests.engine.families.golden_families import golden_family

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-3  # sums in another order, in three TF32 passes where tensor cores work
SLOTS, CONTEXT, PROMPT, STEPS = 4, 96, 40, 8


@pytest.mark.parametrize(
    "name",
    ["mixtral", "qwen3_moe", "olmoe", "qwen3_moe_fp8", "granitemoe", "glm4_moe", "minimax_m2", "gpt_oss"],
)
def test_captured_steps_give_the_golden_logits(name: str) -> None:
    tier = Tier("vram:0", GPU_BASE_BYTES + (1 << 30), torch.device("cuda", 0))
    workload = Workload(context=CONTEXT, sequences=SLOTS, prefill_chunk=64)
    golden = golden_family(name)
    model = load(golden.path, MemoryBudget(1 << 30, (tier,), workload)).model
    assert isinstance(model, Decoder)
    cache, ids = model.new_cache(SLOTS, CONTEXT), golden.ids()
    assert isinstance(cache.decoder, DecoderOnGpus), "nothing was recorded"
    for stay in cache.decoder.step.stays:
        assert isinstance(stay.program, GpuProgram)
        assert stay.program.is_captured
    for slot in range(3):
        model.forward(Batch.of([(slot, 0, ids[: PROMPT + slot])]), cache)
    for step in range(STEPS):
        parts = [(slot, at := PROMPT + slot + step, ids[at : at + 1]) for slot in range(3)]
        found = model.forward(Batch.of(parts), cache)
        expected = golden.logits()[[at for _, at, _ in parts]]
        assert (found - expected).abs().max() < TOLERANCE
    model.close()
