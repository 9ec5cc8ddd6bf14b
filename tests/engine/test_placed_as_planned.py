"""What a plan prints is what is allocated: byte for byte, for random machines and models."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.families.base import Model
from engine.families.decoder.forward import Decoder
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from engine.kv_pool import PoolSize, new_pool
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Placement, Workload
from memory.planner.serving import memory_bytes
from memory.planner.shape import ModelShape
from memory.tiers import Tier
from quant.errors import BudgetError
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from quant.packed import PackedTensor
from tests.conftest import golden_path
from tests.engine.families.golden_families import family_path

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

CPU = torch.device("cpu")
MODELS = {
    **{name: golden_path(name) for name in ("v41-a", "v41-c")},
    **{
        name: family_path(name)
        for name in ("deepseek_v4", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm_moe_dsa", "qwen3_next")
    },
}
MACHINES = 6  # of each model


def budgets(shape: ModelShape, random_: random.Random) -> MemoryBudget:
    """DRAM and up to three virtual cards of different sizes, from next to nothing to more than enough."""
    weights = shape.nbytes - sum(layer.experts * layer.expert.nbytes for layer in shape.layers)
    slots = sum(layer.experts for layer in shape.layers) * shape.slot_nbytes
    kv = shape.kv_bytes(160, 1)
    cards = tuple(
        Tier(f"vram:{n}", int(random_.uniform(0.0, 0.8) * (weights / 2 + slots + kv)), CPU, 40e9)
        for n in range(random_.choice((0, 1, 2, 2, 3)))
    )
    dram = int(weights + random_.choice((0.05, 0.3, 0.7, 1.2)) * slots)
    context, sequences = random_.choice((100, 160)), random_.choice((1, 3))
    tokens = random_.choice((None, context, random_.randint(context, sequences * context)))
    return MemoryBudget(dram, cards, Workload(context, sequences, kv_tokens=tokens))


def held_by_layer(model: Model) -> list[Counter[str]]:
    return [Counter(tiers) for tiers in model.expert_tiers()]


def assert_is(model: Model, placement: Placement, limits: MemoryBudget) -> None:
    """Bytes by tier and part, and where each layer's experts are, are the plan's."""
    planned = placement.allocated()
    for tier, parts in planned.items():
        of_weights = {part: nbytes for part, nbytes in parts.items() if part not in ("kv", "prefixes")}
        assert model.held_bytes.get(tier, {}) == of_weights, tier
    is_all_in_dram = sum(map(len, model.expert_tiers())) * model_slot(model) == planned["dram"].get("experts")
    for layer, held in enumerate(held_by_layer(model)):
        expected = placement.experts(layer)
        for gpu in limits.gpus:
            assert held[gpu.name] == expected.get(gpu.name, 0), (layer, gpu.name)
        in_dram = sum(held.values()) - sum(held[gpu.name] for gpu in limits.gpus)
        assert held["dram"] == (in_dram if is_all_in_dram else expected.get("dram", 0)), layer


def assert_caches_are(model: Model, placement: Placement) -> None:
    """A pool of the plan's bytes takes these, all of them and no others, and holds the plan's tokens."""
    work, planned = placement.workload, sum(placement.pool_bytes().values())
    pool = new_pool(model, work.sequences, work.context, PoolSize(planned), prefix_bytes=0)
    program = 0 if pool.cache.program is None else pool.cache.program.nbytes
    assert pool.nbytes == planned
    assert pool.cache.nbytes - program == sum(placement.kv_bytes().values())
    assert pool.tokens >= (work.kv_tokens or work.sequences * work.context)
    assert pool.context == work.context


def model_slot(model: Model) -> int:
    placed = [p for p in placement_of(model).places if p.kind == "routed_experts" and p.tier != "nvme"]
    return placed[0].nbytes // placed[0].count if placed else 1


def placement_of(model: Model) -> Placement:
    assert model.placement is not None
    return model.placement


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_is_planned_is_what_is_allocated(name: str) -> None:
    checkpoint = open_checkpoint(MODELS[name])
    family = family_of(checkpoint)
    shape = family.loaded_shape(checkpoint)
    random_, loaded = random.Random(name), 0
    for _ in range(MACHINES):
        limits = budgets(shape, random_)
        try:
            model = family.load(checkpoint, choose(), limits)
        except BudgetError:
            continue
        loaded += 1
        try:
            assert_is(model, placement_of(model), limits)
            assert_caches_are(model, placement_of(model))
        finally:
            model.close()
    assert loaded >= MACHINES // 2


def test_an_embedding_in_tiles_is_planned_and_loaded_in_memory(tmp_path: Path) -> None:
    path = shutil.copytree(family_path("qwen3_moe_fp8"), tmp_path / "m")
    assert family_of(plain := open_checkpoint(path)).loaded_shape(plain).embedding_stays
    name = "model.embed_tokens.weight"
    file = next(file for file in path.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    rows, cols = tensors[name].shape
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 128), -(-cols // 128))
    save_file(tensors, file)
    index = path / "model.safetensors.index.json"
    entry = f'"{name}": "{file.name}"'
    index.write_text(index.read_text().replace(entry, f'{entry}, "{name}_scale_inv": "{file.name}"'))

    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint)
    shape = family.loaded_shape(checkpoint)
    assert not shape.embedding_stays
    slots = sum(layer.experts for layer in shape.layers) * shape.slot_nbytes
    weights = memory_bytes(shape) - slots
    limits = MemoryBudget(weights + int(0.7 * slots), (), Workload(64, 1))
    model = family.load(checkpoint, choose(), limits)
    try:
        assert placement_of(model).tier_of("embedding", None) == "dram"
        assert_is(model, placement_of(model), limits)
        assert isinstance(model, Decoder)
        assert isinstance(model.weights.embed, PackedTensor)
    finally:
        model.close()
    with pytest.raises(BudgetError, match="used by every token need"):
        family.load(checkpoint, choose(), replace(limits, dram_bytes=weights - 1))


def test_a_head_that_is_the_embedding_too_is_marked() -> None:
    checkpoint = open_checkpoint(family_path("granitemoe"))
    shape = family_of(checkpoint).loaded_shape(checkpoint)
    assert shape.embedding.nbytes == 0
    assert shape.tied.nbytes == checkpoint.entries["model.embed_tokens.weight"].nbytes
    assert shape.head.nbytes > shape.tied.nbytes
