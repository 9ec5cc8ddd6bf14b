"""The whole model on real GPUs: golden logits, budgets, and what virtual GPUs say of the same budgets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from safetensors.torch import load_file

from engine.families.base import Batch
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import load
from memory.experts.copies import SlotCopier
from memory.pages.cuda_space import pages_work
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.placing import GPU_BASE_BYTES
from memory.tiers import Tier, page_lock
from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cuda.slots import GpuSlotLayout
from tests.conftest import golden_path
from tests.quant.kernels.kernel_cases import expert

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
TOKENS = 130
STEP_BYTES = 450_000  # what a plan keeps for a recorded step of v41-a
PAGES = 8 << 20  # of all GPUs, what a sequence's rows take in pages of 2 MiB
HOST_PAGES = 201_216  # what they take on a virtual GPU
# The GPU adds up in another order than the host, in three TF32 passes where tensor cores work.
TOLERANCE = 1e-3


def model_on(gpus: int, dram_bytes: int, gpu_bytes: int, *, virtual: bool = False) -> DeepseekV41:
    """v41-a with so much room on each GPU, beside what a GPU itself takes, and whole pages; all layers are
    there."""
    tiers = tuple(
        Tier(
            f"vram:{i}",
            gpu_bytes + (0 if virtual else GPU_BASE_BYTES + STEP_BYTES + PAGES // gpus),
            torch.device("cpu") if virtual else torch.device("cuda", i),
        )
        for i in range(gpus)
    )
    workload = Workload(context=200, sequences=1, prefill_chunk=64)
    model = load(golden_path("v41-a"), MemoryBudget(dram_bytes, tiers, workload)).model
    assert isinstance(model, DeepseekV41)
    assert {layer.device for layer in model.weights.layers} == {tier.device for tier in tiers}
    return model


def answer(model: DeepseekV41, ids: list[int]) -> torch.Tensor:
    """Logits of a prompt in two chunks and 30 tokens one by one."""
    cache = model.new_cache(1, TOKENS)
    cuts = [0, 40, 100, *range(101, TOKENS + 1)]
    return torch.cat(
        [model.forward(Batch.of([(0, a, ids[a:b])], all_logits=True), cache) for a, b in pairwise(cuts)]
    )


BUDGETS = pytest.mark.parametrize(
    ("dram", "gpu"),
    [
        pytest.param(1 << 30, 8 << 20, id="everything on the GPU"),
        pytest.param(1 << 30, 7 << 19, id="experts everywhere"),
        pytest.param(1_300_000, 7 << 19, id="and on disk"),
    ],
)


@pytest.mark.parametrize(
    ("gpus", "dram", "gpu", "elsewhere"),
    [
        pytest.param(1, 1 << 30, 8 << 20, set(), id="everything on the GPU"),
        pytest.param(1, 1 << 30, 7 << 19, {"dram"}, id="experts everywhere"),
        pytest.param(1, 1_300_000, 7 << 19, {"dram", "nvme"}, id="and on disk"),
        pytest.param(2, 1 << 30, 8 << 20, set(), id="everything on two GPUs"),
        pytest.param(2, 1 << 30, 5 << 19, {"dram"}, id="experts on two GPUs and in DRAM"),
    ],
)
def test_golden_logits_on_gpus(gpus: int, dram: int, gpu: int, elsewhere: set[str]) -> None:
    if gpus > GPUS:
        pytest.skip("needs two CUDA devices")
    golden = load_file(golden_path("v41-a") / "expected.safetensors")
    model = model_on(gpus, dram, gpu)
    tiers = {tier for layer in model.expert_tiers() for tier in layer}
    assert tiers == elsewhere | {f"vram:{i}" for i in range(gpus)}
    logits = answer(model, golden["input_ids"].tolist())
    again = answer(model, golden["input_ids"].tolist())
    seen = model.telemetry.snapshot()
    model.close()
    assert (logits - golden["logits"][:TOKENS]).abs().max() < TOLERANCE
    assert (logits - again).abs().max() < TOLERANCE
    assert all(seen.computed[f"vram:{i}"] > 0 for i in range(gpus))


@BUDGETS
def test_a_gpu_allocates_no_more_than_its_budget(dram: int, gpu: int) -> None:
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    model = model_on(1, dram, gpu)
    ids = load_file(golden_path("v41-a") / "expected.safetensors")["input_ids"].tolist()
    answer(model, ids)
    grown = torch.cuda.max_memory_allocated(0) - before
    allocated, pages = model.tier_bytes["vram:0"], model.weights.places.kv_room["vram:0"]
    model.close()
    assert allocated + pages <= gpu + STEP_BYTES + PAGES
    # Pages are the driver's, and a CUDA context is nothing of torch's either.
    assert grown <= gpu + STEP_BYTES + PAGES - (pages if pages_work(torch.device("cuda", 0)) else 0)


@BUDGETS
def test_real_and_virtual_gpus_place_and_answer_alike(dram: int, gpu: int) -> None:
    ids = load_file(golden_path("v41-a") / "expected.safetensors")["input_ids"].tolist()
    real = model_on(1, dram, gpu)
    virtual = model_on(1, dram, real.tier_bytes["vram:0"] + HOST_PAGES, virtual=True)
    counts = [Counter(tier for layer in model.expert_tiers() for tier in layer) for model in (real, virtual)]
    assert counts[0] == counts[1]
    logits = [answer(model, ids) for model in (real, virtual)]
    hits = [sum(model.telemetry.snapshot().hits.values()) for model in (real, virtual)]
    for model in (real, virtual):
        model.close()
    assert (logits[0] - logits[1]).abs().max() < TOLERANCE
    assert hits[0] == hits[1]


def test_an_expert_goes_to_a_gpu_and_back_unchanged_while_kernels_read_the_slot() -> None:
    device = torch.device("cuda", 0)
    panels, on_gpu = ExpertSlotLayout(512, 256, MXFP4), GpuSlotLayout(512, 256, MXFP4)
    sources = torch.zeros(2, panels.nbytes, dtype=torch.uint8).pin_memory()
    for n, source in enumerate(sources):
        panels.pack_into(source, *expert(MXFP4, 512, 256, n).matrices)
    copier = SlotCopier(Tier("vram:0", 1 << 30, device), [panels], [on_gpu])
    slot = torch.zeros(on_gpu.nbytes, dtype=torch.uint8, device=device)
    back = torch.zeros_like(sources[0])
    for turn in range(20):
        source = sources[turn % 2]
        copier.upload(0, slot, source, copier.fence())
        copies = [slot.clone() for _ in range(8)]  # still to run when the slot is asked to be overwritten
        copier.download(0, back, slot, copier.fence())
        copier.upload(0, slot, sources[(turn + 1) % 2], copier.fence())
        assert torch.equal(back, source)
        assert all(torch.equal(copies[0], copy) for copy in copies)
        assert not torch.equal(copies[0], slot)


def test_memory_that_cannot_be_page_locked_is_used_as_it_is() -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    host = Tier("dram", 1 << 20, torch.device("cpu"))
    assert page_lock(memory, host)
    assert not page_lock(memory, host)  # it is already
    assert torch.ones(4, device="cuda").sum().item() == 4  # and CUDA has forgotten that it refused
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
