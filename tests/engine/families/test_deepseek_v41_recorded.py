"""V4.1's recorded decode step gives the bits of its operations one by one, wherever the experts lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.families.base import Batch
from engine.families.deepseek_v41.family import FAMILY
from engine.families.deepseek_v41.forward import DeepseekV41, V41Cache
from engine.families.streams.operations import MAX_ROWS
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from memory.tiers import Tier
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.program import HandOver
from quant.kernels.reference import ReferenceKernels
from tests.conftest import golden_path
from tests.engine.families.recorded_pairs import Pair
from tests.engine.families.recorded_streams import (
    assert_any_number_of_sequences_is_computed,
    failures,
    forget,
    program_of,
)

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

SLOTS, CONTEXT = 3, 64
CPU = torch.device("cpu")


def tight(path: Path, held: str) -> MemoryBudget:
    """Room for few Engram rows, and for some of the experts in DRAM, perhaps some on two virtual GPUs; or for
    all experts in DRAM."""
    whole = FAMILY.load(open_safetensors(path), NativeKernels(), MemoryBudget(1 << 30))
    experts = whole.weights.experts.tier_bytes["dram"]
    dense = whole.weights.places.nbytes["dram"]
    tables, embed = whole.weights.engram.nbytes, whole.weights.embed
    assert isinstance(embed, torch.Tensor)
    whole.close()
    workload = Workload(context=300, sequences=MAX_ROWS + 2)
    if held == "experts":
        return MemoryBudget(dense + experts + tables // 2, workload=workload)
    if held == "some":
        return MemoryBudget(dense - embed.nbytes + experts // 2, workload=workload)  # it stays on disk
    gpus = tuple(Tier(f"vram:{n}", experts // 12, CPU, link_bytes_per_s=1e9) for n in range(2))
    return MemoryBudget(dense + experts // 5, gpus, workload)


HELD = [
    *itertools.product(["v41-a", "v41-b", "v41-c"], ["all", "some", "gpus"]),
    ("v41-b", "experts"),
    ("v41-c", "experts"),
]


@pytest.fixture(scope="module", params=HELD, ids="-".join)
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekV41]:
    name, held = request.param
    path = golden_path(name)
    budget = MemoryBudget(1 << 30) if held == "all" else tight(path, held)
    loaded = FAMILY.load(open_safetensors(path), NativeKernels(), budget)
    assert loaded.weights.experts.is_still == (held in ("all", "experts"))
    assert (loaded.parts.ngrams is not None) == (held == "all")
    yield loaded
    loaded.close()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_prompts_decodes_aborts_and_prefixes_in_any_order(model: DeepseekV41, data: st.DataObject) -> None:
    pair = Pair(model, lambda: model.new_cache(SLOTS, CONTEXT), forget)
    pair.do_anything(data, model.info.vocab_size, CONTEXT, longest=24)


def test_long_sequences_pass_windows_groups_and_choices(model: DeepseekV41) -> None:
    context = 300
    pair = Pair(model, lambda: model.new_cache(2, context), forget)
    ids = torch.randint(
        0, model.info.vocab_size, (context,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    pair.run([(0, ids[:200])])
    pair.run([(1, ids[:3])])
    for at in range(200, 240):
        pair.run([(0, ids[at : at + 1]), (1, ids[at - 190 : at - 189])])


def test_more_sequences_than_a_program_takes_are_computed_all_the_same(model: DeepseekV41) -> None:
    assert_any_number_of_sequences_is_computed(model)


def test_a_programs_buffers_are_counted_with_the_cache(model: DeepseekV41) -> None:
    cache = model.new_cache(2, 40)

    assert model.cache_bytes(2, 40) == cache.nbytes
    assert cache.nbytes > model.cache_shape.nbytes(2, 40) + 4 * MAX_ROWS * model.info.vocab_size


def test_uses_of_experts_are_counted_alike(model: DeepseekV41) -> None:
    def uses(cache: V41Cache) -> int:
        before = sum(model.telemetry.snapshot().hits.values())
        model.forward(Batch.of([(0, 0, [3]), (1, 0, [9])]), cache)
        return sum(model.telemetry.snapshot().hits.values()) - before

    replayed, eager = model.new_cache(2, 8), model.new_cache(2, 8)
    forget(eager)
    assert uses(replayed) == uses(eager) > 0


def test_rows_of_engram_tables_are_counted_alike(model: DeepseekV41) -> None:
    def counts(cache: V41Cache) -> tuple[int, ...]:
        before = model.telemetry.snapshot().rows
        for at in range(3):
            model.forward(Batch.of([(0, at, [3]), (1, at, [3]), (2, at, [9])]), cache)
        after = model.telemetry.snapshot().rows
        return tuple(after[name] - before.get(name, 0) for name in ("asked", "unique"))

    replayed, eager = model.new_cache(3, 8), model.new_cache(3, 8)
    forget(eager)
    asked, unique = counts(replayed)
    assert (asked, unique) == counts(eager)
    assert 0 < unique < asked


def test_a_step_that_fails_at_any_hand_over_can_be_computed_again(model: DeepseekV41) -> None:
    cache = model.new_cache(1, 16)
    noted = enumerate(program_of(cache).noted)
    failed = failures(model, cache, [at for at, of in noted if of.kind == "hand_over"])
    if not model.weights.experts.is_still:  # else only rows that are late are handed over
        assert failed > model.config.num_hidden_layers


def test_a_step_comes_back_only_for_experts_that_are_not_at_hand(model: DeepseekV41) -> None:
    layers = model.config.num_hidden_layers
    cache = model.new_cache(1, 60)
    assert cache.program is not None
    computed: list[int] = []  # at which operations, by the store

    def counted(at: int, work: HandOver) -> HandOver:
        def both(rows: int) -> None:
            computed.append(at)
            work(rows)

        return both

    for at, work in list(cache.program.hand_overs.items()):
        if cache.program.noted[at].kind == "experts":
            cache.program.hand_overs[at] = counted(at, work)
    for at in range(40):
        if at == 20:
            computed.clear()
            before = model.telemetry.snapshot().hits
        model.forward(Batch.of([(0, at, [7 + at % 2])]), cache)
    hits = model.telemetry.snapshot().hits
    uses = sum(hits.values()) - sum(before.values())

    assert uses == 20 * layers * model.config.num_experts_per_tok
    if model.weights.experts.at_hand is not None:  # with GPUs, the store decides in each layer
        assert len(computed) <= 20 * layers * 3 / 4


def test_plain_torch_records_nothing() -> None:
    path = golden_path("v41-a")
    loaded = FAMILY.load(open_safetensors(path), ReferenceKernels(), MemoryBudget(1 << 30))
    cache = loaded.new_cache(1, 4)

    assert cache.decoder is None
    assert loaded.cache_bytes(1, 4) == cache.nbytes
    loaded.close()
