"""Budgets decide where a decoder's experts are and what moves, never what the model answers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engine.families.base import Batch
from engine.families.decoder.forward import Decoder
from engine.families.decoder.shape import loaded_shape
from engine.families.held import tensors_in
from engine.families.loader import open_checkpoint
from engine.families.shapes import shape_of
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.planner.shape import ModelShape
from memory.tiers import Tier
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from tests.engine.families.golden_families import (
    NAMES,
    PLENTY,
    Golden,
    assert_close,
    golden_family,
    loaded,
    tiers_in_use,
)

CPU = torch.device("cpu")
WORKLOAD = Workload(context=160)


def answer(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Logits of a prompt in two chunks, and of its last tokens one by one."""
    cache = model.new_cache(1, len(ids))
    cuts = [0, 30, 60, *range(61, len(ids) + 1)]
    return torch.cat(
        [model.forward(Batch.of([(0, a, ids[a:b])], all_logits=True), cache) for a, b in pairwise(cuts)]
    )


def budget(golden: Golden, dram: int, *gpus: int, with_layers: bool = False) -> MemoryBudget:
    """As `budget_of`."""
    return budget_of(shape_of(open_checkpoint(golden.path)), dram, *gpus, with_layers=with_layers)


def budget_of(
    shape: ModelShape, dram: int, *gpus: int, with_layers: bool = False, workload: Workload = WORKLOAD
) -> MemoryBudget:
    """Room for so many experts in DRAM and on virtual GPUs; with_layers: and for a layer on each of these."""
    size, weights = shape.expert_nbytes, max(part.dense.nbytes + part.shared.nbytes for part in shape.layers)
    fixed = shape.nbytes - sum(layer.experts for layer in shape.layers) * size
    kv = [layer.kv.nbytes(workload.context) for layer in shape.layers]
    layer = weights + max(kv)
    tiers = tuple(
        Tier(f"vram:{n}", experts * size + (layer if with_layers else 0), CPU, link_bytes_per_s=50e6)
        for n, experts in enumerate(gpus)
    )
    on_gpus = (weights + min(kv)) * len(gpus) if with_layers else 0
    return MemoryBudget(
        max(shape.embedding.nbytes, fixed - on_gpus) + int(dram * size * 1.1), tiers, workload
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_bits_in_dram_on_disk_and_on_two_virtual_gpus(name: str) -> None:
    golden = golden_family(name)
    ids = golden.ids()
    with loaded(golden.path, choose()) as model:
        in_dram = answer(model, ids)
    assert_close(in_dram, golden.logits())
    tiers: set[str] = set()
    for limits in (budget(golden, 6), budget(golden, 6, 4, 5), budget(golden, 6, 5, 6, with_layers=True)):
        with loaded(golden.path, choose(), limits) as model:
            found = answer(model, ids)
            tiers |= tiers_in_use(model, limits)
        assert torch.equal(found, in_dram)
    assert tiers == {"nvme", "dram", "vram:0", "vram:1"}
    assert set(model.weights.places.tiers) & {"vram:0", "vram:1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_experts_are_read_ahead_of_need_and_guesses_are_often_right(name: str) -> None:
    golden = golden_family(name)
    with loaded(golden.path, choose(), budget(golden, 12)) as model:
        answer(model, golden.ids())
        assert model.telemetry is not None
        seen = model.telemetry.snapshot()
    assert seen.moves["nvme prefetch"] > 0
    assert seen.guesses["right"] > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")
def test_a_layer_takes_the_memory_that_a_plan_counts(name: str) -> None:
    golden = golden_family(name)
    with loaded(golden.path, choose(), PLENTY) as model:
        planned = loaded_shape(model.description, open_checkpoint(golden.path), name).layers
        for layer, shape in zip(model.weights.layers, planned, strict=True):
            used = sum(tensor.nbytes for tensor in tensors_in(layer))
            assert used == shape.dense.nbytes + shape.shared.nbytes


def test_a_machine_with_everything_in_dram_reads_each_expert_once() -> None:
    golden = golden_family("qwen3_moe")
    with loaded(golden.path, choose(), PLENTY) as model:
        answer(model, golden.ids())
        assert model.telemetry is not None
        seen = model.telemetry.snapshot()
    assert seen.moves["nvme demand"] == sum(
        layer.experts for layer in shape_of(open_checkpoint(golden.path)).layers
    )
    assert seen.hits.keys() == {"dram"}
