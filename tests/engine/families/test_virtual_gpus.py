"""The whole model on two GPUs that exist in name only: every tensor must be where it is needed.

Operations that mix devices are errors there, as on real GPUs, while the numbers are real: so what is checked
is that the forward, the caches, the expert store and the way of experts to GPUs and back are right on any
devices. What is not checked are streams, events and the kernels of real GPUs; see tests/gpu.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from engine.cache.prefix import PrefixCache
from engine.families.base import Batch
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.registry import family_of
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.placing import GPU_BASE_BYTES
from memory.tiers import Tier
from quant.errors import BudgetError
from quant.kernels.choice import choose
from quant.kernels.cuda.slots import GpuSlotLayout
from quant.kernels.devices import DeviceKernels
from quant.kernels.interface import ExpertFormats, Kernels, Weight
from quant.kernels.reference import ReferenceKernels
from quant.packed import Format, PackedTensor
from tests.conftest import golden_path

TOKENS = 40
STEP_BYTES = 450_000  # what a plan keeps for a recorded step of v41-a
WORKLOAD = Workload(context=200, sequences=2, prefill_chunk=64)


class OneGpu(ReferenceKernels):
    """Stands in for Triton: the same interface and the same slots, in plain torch."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def prepare(self, weight: Weight) -> Weight:
        if isinstance(weight, torch.Tensor):
            return weight.to(self.device)
        scales = None if weight.scales is None else weight.scales.to(self.device)
        return PackedTensor(weight.format, weight.shape, weight.codes.to(self.device), scales)

    def slot_layout(self, hidden: int, width: int, formats: Format | ExpertFormats) -> GpuSlotLayout:
        return GpuSlotLayout(hidden, width, formats)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(golden_path("v41-a") / "expected.safetensors")


def load(
    gpus: tuple[torch.device, ...], dram_bytes: int, gpu_bytes: int, host: Kernels | None = None
) -> DeepseekV41:
    """v41-a with so much room on each GPU, beside what a GPU itself takes."""
    tiers = tuple(
        Tier(f"vram:{i}", GPU_BASE_BYTES + STEP_BYTES + gpu_bytes, device, 40e9)
        for i, device in enumerate(gpus)
    )
    kernels = DeviceKernels(host or choose(), {gpu: OneGpu(gpu) for gpu in gpus})
    checkpoint = open_safetensors(golden_path("v41-a"))
    model = family_of(checkpoint).load(checkpoint, kernels, MemoryBudget(dram_bytes, tiers, WORKLOAD))
    assert isinstance(model, DeepseekV41)
    return model


def answer(model: DeepseekV41, ids: list[int]) -> torch.Tensor:
    """Logits of a prompt in two chunks and some tokens one by one."""
    cache = model.new_cache(1, len(ids))
    cuts = [0, 30, *range(len(ids) - 4, len(ids) + 1)]
    return torch.cat(
        [model.forward(Batch.of([(0, a, ids[a:b])], all_logits=True), cache) for a, b in pairwise(cuts)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "dram", "gpu"),
    [
        pytest.param(2, 1 << 30, 8 << 20, id="everything on the GPUs"),
        pytest.param(2, 1 << 30, 3 << 20, id="layers on both, experts everywhere"),
        pytest.param(2, 1_200_000, 1_700_000, id="and on disk"),
        pytest.param(1, 1 << 30, 2 << 20, id="one GPU, some layers on the CPU"),
    ],
)
def test_golden_logits_with_layers_and_experts_on_gpus(
    gpus: tuple[torch.device, torch.device],
    golden: dict[str, torch.Tensor],
    count: int,
    dram: int,
    gpu: int,
) -> None:
    model = load(gpus[:count], dram, gpu)
    logits = answer(model, golden["input_ids"][:TOKENS].tolist())
    seen, places, allocated = model.telemetry.snapshot(), model.weights.places, model.tier_bytes
    model.close()
    assert (logits - golden["logits"][:TOKENS]).abs().max() < 1e-4
    assert {device.type for device in places.layers} >= {"gpu"}
    for tier in ("vram:0", "vram:1")[:count]:
        assert seen.computed[tier] > 0
        assert allocated[tier] + places.kv_room.get(tier, 0) <= GPU_BASE_BYTES + STEP_BYTES + gpu
    assert allocated["dram"] <= dram
    swapped = [link for link in seen.moved_bytes if link.endswith("to dram")]
    assert bool(swapped) == (dram < 1 << 30)  # where DRAM does not hold everything anyway


@pytest.mark.slow
def test_a_machine_without_compiled_kernels_moves_experts_to_gpus_as_they_are(
    gpus: tuple[torch.device, torch.device], golden: dict[str, torch.Tensor]
) -> None:
    model = load(gpus, 1_500_000, 2_700_000, ReferenceKernels())
    logits = answer(model, golden["input_ids"][:TOKENS].tolist())
    moved = model.telemetry.snapshot().moved_bytes
    model.close()
    assert (logits - golden["logits"][:TOKENS]).abs().max() < 1e-4
    assert moved["vram:0"] > 0
    assert moved["vram:0 to dram"] > 0


@pytest.mark.slow
def test_a_known_prefix_is_put_back_onto_the_gpus(
    gpus: tuple[torch.device, torch.device], golden: dict[str, torch.Tensor]
) -> None:
    ids = golden["input_ids"][:24].tolist()
    model = load(gpus, 1 << 30, 3 << 20)
    cache = model.new_cache(2, 64)
    model.forward(Batch.of([(0, 0, ids[:20])]), cache)
    prefixes = PrefixCache(cache, 1 << 24)
    prefixes.save(0, ids[:20], "", None)
    known = prefixes.restore(1, ids, "").length
    assert known > 0
    first, second = (
        model.forward(Batch.of([(slot, held, ids[held:])]), cache) for slot, held in ((0, 20), (1, known))
    )
    model.close()
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.slow
def test_a_gpu_without_room_for_the_cache_says_so(gpus: tuple[torch.device, torch.device]) -> None:
    model = load(gpus, 1 << 30, 8 << 20)
    with pytest.raises(BudgetError, match=r"vram:\d: the KV cache of 2 sequences of 100000 tokens needs"):
        model.new_cache(2, 100_000)
    model.close()


def test_a_gpu_too_small_to_work_on_is_refused(gpus: tuple[torch.device, torch.device]) -> None:
    with pytest.raises(BudgetError, match=r"vram:0: 0\.6 GB is too little for CUDA, activations"):
        load(gpus, 1 << 30, 1000)


@pytest.mark.slow
def test_what_gpus_hold_of_the_cache_is_not_counted_as_host_memory(
    gpus: tuple[torch.device, torch.device],
) -> None:
    model = load(gpus, 1 << 30, 8 << 20)
    cache = model.new_cache(2, 200)
    in_host_memory = cache.history.nbytes + sum(w.nbytes for w in cache.windows if w.device.type == "cpu")
    assert model.cache_bytes(2, 200) == in_host_memory < cache.nbytes
    model.close()
