"""V4 on two GPUs that exist in name only: every tensor must be where it is needed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engine.families.base import Batch
from engine.families.deepseek_v4.family import FAMILY
from engine.families.loader import open_checkpoint
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.placing import GPU_BASE_BYTES
from memory.tiers import Tier
from quant.kernels.choice import choose
from quant.kernels.devices import DeviceKernels
from tests.engine.families.golden_families import assert_close, golden_family
from tests.engine.families.test_virtual_gpus import OneGpu

pytestmark = pytest.mark.slow

STEP_BYTES = 1_000_000  # what a plan keeps for activations and a step
TOKENS = 140  # past windows, and an entry of 128


@pytest.mark.parametrize(
    ("count", "dram", "gpu"),
    [
        pytest.param(2, 1 << 30, 16 << 20, id="everything on the GPUs"),
        pytest.param(2, 3_000_000, 3_300_000, id="layers on both, experts everywhere"),
        pytest.param(1, 1 << 30, 3_300_000, id="one GPU, some layers on the CPU"),
    ],
)
def test_golden_logits_with_layers_and_experts_on_gpus(
    gpus: tuple[torch.device, torch.device], count: int, dram: int, gpu: int
) -> None:
    golden = golden_family("deepseek_v4")
    ids, room = golden.ids()[:TOKENS], GPU_BASE_BYTES + STEP_BYTES + gpu
    tiers = tuple(Tier(f"vram:{i}", room, device, 40e9) for i, device in enumerate(gpus[:count]))
    kernels = DeviceKernels(choose(), {device: OneGpu(device) for device in gpus[:count]})
    workload = Workload(context=200, sequences=1, prefill_chunk=64)
    model = FAMILY.load(open_checkpoint(golden.path), kernels, MemoryBudget(dram, tiers, workload))
    cache = model.new_cache(1, TOKENS)
    assert cache.decoder is None  # its steps are recorded in host memory alone
    cuts = [0, 100, TOKENS - 2, TOKENS - 1, TOKENS]
    logits = torch.cat(
        [model.forward(Batch.of([(0, a, ids[a:b])], all_logits=True), cache) for a, b in pairwise(cuts)]
    )
    seen, places, allocated = model.telemetry.snapshot(), model.weights.places, model.tier_bytes
    model.close()

    assert_close(logits, golden.logits()[:TOKENS])
    assert {device.type for device in places.layers} >= {"gpu"}
    for tier in ("vram:0", "vram:1")[:count]:
        assert seen.computed[tier] > 0
        assert allocated[tier] + places.kv_room.get(tier, 0) <= room
    assert allocated["dram"] <= dram
