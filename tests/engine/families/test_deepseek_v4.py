"""The V4 family against the reference logits of its golden checkpoint, however it is computed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.cache.prefix import PrefixCache
from engine.families.base import Batch, Trace
from engine.families.deepseek_v4.family import FAMILY
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.loader import open_checkpoint
from engine.families.shapes import shape_of
from memory.checkpoint.reads import read_tensor
from memory.convert.files import convert_checkpoint
from memory.convert.plan import Choices
from memory.planner.budget import MemoryBudget
from memory.planner.placement import Workload
from quant.formats.fp8 import FP8_128
from quant.formats.int4 import INT4_GROUPS
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.interface import Kernels
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.golden_families import (
    PLENTY,
    SEQUENCES,
    Golden,
    assert_close,
    assert_right_experts,
    assert_right_in_a_batch,
    golden_family,
    greedy_ids,
    logits_in_chunks,
    tiers_in_use,
)
from tests.engine.families.test_decoder_tiers import budget, budget_of
from tests.engine.families.test_deepseek_v4_refusals import rewrite

LEVELS = library.available_levels() if library.library_path() is not None else ()


@contextmanager
def loaded(golden: Golden, kernels: Kernels, limits: MemoryBudget = PLENTY) -> Iterator[DeepseekV4]:
    model = FAMILY.load(open_checkpoint(golden.path), kernels, limits)
    try:
        yield model
    finally:
        model.close()


@pytest.fixture(scope="module")
def golden() -> Golden:
    return golden_family("deepseek_v4")


@pytest.fixture(scope="module")
def model(golden: Golden) -> Iterator[DeepseekV4]:
    with loaded(golden, choose()) as found:
        yield found


@pytest.mark.parametrize("which", SEQUENCES)
def test_logits_of_a_whole_prompt_match_at_every_position(
    golden: Golden, model: DeepseekV4, which: str
) -> None:
    found = logits_in_chunks(model, golden.ids(which), [len(golden.ids(which))])
    assert_close(found, golden.logits(which))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1], [7], [64], [1, 64, 7, 3, 2, 33]], ids=["1", "7", "64", "mixed"])
def test_logits_do_not_depend_on_how_the_prompt_is_cut(
    golden: Golden, model: DeepseekV4, sizes: list[int]
) -> None:
    assert_close(logits_in_chunks(model, golden.ids(), sizes), golden.logits())


@pytest.mark.parametrize("which", SEQUENCES)
def test_the_greedy_continuation_is_the_references(golden: Golden, model: DeepseekV4, which: str) -> None:
    expected = golden.greedy(which)
    assert greedy_ids(model, golden.ids(which), len(expected)) == expected


@pytest.mark.slow
def test_sequences_of_different_lengths_share_a_batch_without_noticing(
    golden: Golden, model: DeepseekV4
) -> None:
    assert_right_in_a_batch(golden, model)


def test_routers_and_token_ids_choose_the_experts_of_the_reference_with_its_weights(
    golden: Golden, model: DeepseekV4
) -> None:
    trace, ids = Trace(), golden.ids()
    model.forward(Batch.of([(0, 0, ids)]), model.new_cache(1, len(ids)), trace)
    assert model.config.hashed_layers == 2
    assert_right_experts(golden, trace, range(model.config.layers))


@pytest.mark.parametrize("size", [300, 7])
def test_indexers_choose_the_entries_of_the_reference(golden: Golden, model: DeepseekV4, size: int) -> None:
    trace, ids = Trace(), golden.ids()
    cache = model.new_cache(1, len(ids))
    for start in range(0, len(ids), size):
        model.forward(Batch.of([(0, start, ids[start : start + size])]), cache, trace)
    compared = 0
    for key, expected in golden.expected.items():
        if not key.startswith("index_selected."):
            continue
        selected, row = torch.zeros_like(expected), 0
        for entries in trace.values[key]:
            for of_token in entries:
                selected[row, of_token[of_token >= 0]] = 1
                row += 1
        assert torch.equal(selected, expected)
        compared += 1
    assert compared == 2


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_gives_the_logits(golden: Golden, level: str) -> None:
    with loaded(golden, NativeKernels(level=level)) as model:
        assert_close(logits_in_chunks(model, golden.ids(".2"), [100, 1]), golden.logits(".2"))


@pytest.mark.slow
def test_plain_torch_gives_the_logits_and_the_greedy_continuation(golden: Golden) -> None:
    with loaded(golden, ReferenceKernels()) as model:
        assert_close(logits_in_chunks(model, golden.ids(), [64]), golden.logits())
        assert_close(logits_in_chunks(model, golden.ids(".1"), [1]), golden.logits(".1"))
        expected = golden.greedy(".1")
        assert greedy_ids(model, golden.ids(".1"), len(expected)) == expected
        assert model.cache_bytes(2, 50) == model.new_cache(2, 50).nbytes


def test_the_cache_is_as_large_as_was_said(model: DeepseekV4) -> None:
    cache = model.new_cache(3, 300)
    tensors = [*cache.windows]
    for state in (state for of_layer in cache.states for state in of_layer):
        tensors += [state.entries, state.open_kv, state.open_gate]
    assert cache.program is not None
    assert model.cache_bytes(3, 300) == cache.nbytes == sum(t.nbytes for t in tensors) + cache.program.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("taken_back", [1, 4, 16])
@pytest.mark.parametrize("length", [20, 128, 130, 260])
def test_a_state_can_be_taken_back_past_the_ends_of_groups(
    golden: Golden, model: DeepseekV4, length: int, taken_back: int
) -> None:
    """To behind and before entries of four and of 128 tokens; the next tokens' logits are the very same."""
    ids, kept = golden.ids()[:length], length - taken_back
    others = golden.ids()[length : length + 20]
    cache = model.new_cache(2, 300)
    prefixes = PrefixCache(cache, 1 << 26)
    for at in range(0, length, 50):
        model.forward(Batch.of([(0, at, ids[at : min(at + 50, length)])]), cache)
    prefixes.save(0, ids)
    assert prefixes.restore(1, ids[:kept] + others).length == kept
    found = model.forward(Batch.of([(1, kept, others)], all_logits=True), cache)

    cache.reset(0)
    model.forward(Batch.of([(0, 0, ids[:kept])]), cache)
    expected = model.forward(Batch.of([(0, kept, others)], all_logits=True), cache)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_logits_are_the_same_bits_in_dram_on_disk_and_on_two_virtual_gpus(golden: Golden) -> None:
    cuts = [0, 100, 250, *range(251, 280)]

    def answer(model: DeepseekV4) -> torch.Tensor:
        cache = model.new_cache(1, 280)
        parts = [(0, a, golden.ids()[a:b]) for a, b in pairwise(cuts)]
        return torch.cat([model.forward(Batch.of([part], all_logits=True), cache) for part in parts])

    with loaded(golden, choose()) as model:
        in_dram = answer(model)
    assert_close(in_dram, golden.logits()[: cuts[-1]])
    tiers: set[str] = set()
    on_gpus = budget_of(
        shape_of(open_checkpoint(golden.path)), 6, 5, 6, with_layers=True, workload=Workload(context=280)
    )
    for limits in (budget(golden, 6), budget(golden, 6, 4, 5), on_gpus):
        with loaded(golden, choose(), limits) as model:
            found = answer(model)
            tiers |= tiers_in_use(model, limits)
        assert torch.equal(found, in_dram)
    assert tiers == {"nvme", "dram", "vram:0", "vram:1"}
    assert set(model.weights.places.tiers) & {"vram:0", "vram:1"}


@pytest.mark.slow
def test_experts_that_token_ids_choose_are_foreseen_without_fail(golden: Golden) -> None:
    guesses: dict[int, set[int]] = {}
    with loaded(golden, choose(), budget(golden, 12)) as model:
        store = model.weights.experts
        prefetch = store.prefetch
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                store,
                "prefetch",
                lambda layer, ids: (guesses.update({layer: set(ids)}), prefetch(layer, ids)),
            )
            trace = Trace()
            model.forward(Batch.of([(0, 0, golden.ids(".1"))]), model.new_cache(1, 8), trace)
    assert guesses.keys() == set(range(model.config.layers))
    for layer in range(model.config.hashed_layers):
        assert guesses[layer] == set(trace.values[f"router_ids.{layer}"][0].flatten().tolist())


@pytest.mark.slow
def test_a_converted_checkpoint_answers_as_exactly_as_its_formats_allow(
    golden: Golden, model: DeepseekV4, tmp_path: Path
) -> None:
    """FP8 fits into bfloat16. INT4 experts are 6 % off in each matrix, so 10 % in three; a wrong layout is
    140 %."""
    choices = Choices(dense=torch.bfloat16, experts=INT4_GROUPS[32])
    convert_checkpoint(golden.path, tmp_path / "converted", choices, lambda done, total: None, 1)
    converted = FAMILY.load(open_checkpoint(tmp_path / "converted"), choose(), PLENTY)
    ids, weights = torch.arange(32).view(16, 2) % 6, torch.ones(16, 2)
    x = torch.randn(16, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found, expected = (m.weights.experts.acquire(2, ids).run(x, weights, 10.0) for m in (converted, model))
    assert 0.01 < (found - expected).norm() / expected.norm() < 0.25
    dense = [layer.attn.wo_b for layer in converted.weights.layers]
    assert all(isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16 for weight in dense)
    logits = logits_in_chunks(converted, golden.ids(".2"), [100, 1])
    assert (logits - golden.logits(".2")).norm() / golden.logits(".2").norm() < 0.5
    converted.close()


@pytest.mark.slow
@pytest.mark.parametrize("has_float_scales", [True, False])
def test_experts_in_fp8_are_read_with_either_kind_of_scales(
    golden: Golden, model: DeepseekV4, tmp_path: Path, has_float_scales: bool
) -> None:
    path, files = tmp_path / "fp8", model.weights.experts._files
    shutil.copytree(golden.path, path)
    changes: dict[str, torch.Tensor | None] = {}
    for layer, expert, number in itertools.product(range(model.config.layers), range(6), range(3)):
        weight, scale = files.entries(layer, expert, number)
        raw = {entry.name: read_tensor(entry) for entry in (weight, scale)}
        values = files.matrix(layer, expert, number, raw).decode()
        packed = FP8_128.encode(values, FP8_128.float_scales(values) if has_float_scales else None)
        assert packed.scales is not None
        changes[weight.name] = packed.codes.view(torch.float8_e4m3fn)
        changes[scale.name] = packed.scales if has_float_scales else packed.scales.view(torch.float8_e8m0fnu)
    rewrite(path, changes)
    ids, weights = torch.arange(32).view(16, 2) % 6, torch.ones(16, 2)
    x = torch.randn(16, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with loaded(Golden(path, golden.expected), choose()) as found:
        ours, theirs = (m.weights.experts.acquire(2, ids).run(x, weights, 10.0) for m in (found, model))
        assert (ours - theirs).norm() / theirs.norm() < 0.1
        logits = logits_in_chunks(found, golden.ids(".2"), [100, 1])
    if not has_float_scales:  # FP8 holds these FP4 values exactly
        assert_close(logits, golden.logits(".2"))
    with loaded(Golden(path, golden.expected), ReferenceKernels()) as plain:
        assert_close(logits_in_chunks(plain, golden.ids(".2"), [120]), logits)
