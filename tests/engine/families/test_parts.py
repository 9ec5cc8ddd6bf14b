"""A model cut into parts, each loaded by itself, computes the same bits as the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.families.base import Batch, KvCache, Model
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from memory.checkpoint.part import Span
from memory.planner.budget import MemoryBudget
from quant.errors import ConfigError
from quant.kernels.choice import choose
from tests.conftest import golden_path
from tests.engine.families.golden_families import golden_family

LONG = 200  # tokens: more than the windows of the golden models
FAMILIES = (
    "deepseek_v2", "deepseek_v32", "gguf_qwen3moe", "glm_moe_dsa", "gpt_oss", "granitemoe", "kimi_k2",
    "minimax_m2", "olmoe", "qwen3_moe_fp8",
)  # fmt: skip


def parts_of(path: Path, cuts: Sequence[int] | None = None) -> list[Model]:
    """The model's parts, cut at these layers, or wherever it may be."""
    checkpoint = open_checkpoint(path)
    family, kernels = family_of(checkpoint), choose()
    cuts = family.cuts(checkpoint) if cuts is None else cuts
    spans = Span.between(cuts, len(family.shape(checkpoint).layers))
    return [family.load(family.part(checkpoint, span), kernels, MemoryBudget(1 << 30)) for span in spans]


def whole_of(path: Path) -> Model:
    checkpoint = open_checkpoint(path)
    return family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(1 << 30))


def through(parts: Sequence[Model], caches: Sequence[KvCache], batch: Batch) -> torch.Tensor:
    """What the last part makes of a batch; those before it compute all tokens."""
    states = None
    for part, cache in zip(parts[:-1], caches[:-1], strict=True):
        states = part.forward(replace(batch.of_all(), states=states), cache).clone()
    return parts[-1].forward(replace(batch, states=states), caches[-1])


def assert_same_bits(path: Path, cuts: Sequence[int] | None = None) -> None:
    """A prompt in two pieces, as one that is to be continued, and ten tokens after it, beside another."""
    whole, parts = whole_of(path), parts_of(path, cuts)
    assert len(parts) > 1
    try:
        drawn = torch.Generator().manual_seed(7)
        ids = torch.randint(3, whole.info.vocab_size, (LONG,), generator=drawn).tolist()
        cache, caches = whole.new_cache(2, LONG), [part.new_cache(2, LONG) for part in parts]
        steps = [replace(Batch.of([(0, 0, ids[:120])]), wanted=(), to_come=(60,))]
        steps += [replace(Batch.of([(0, 120, ids[120:180])]), to_come=(0,)), Batch.of([(1, 0, ids[5:25])])]
        for at in range(180, 190):
            steps.append(Batch.of([(0, at, ids[at : at + 1]), (1, at - 160, ids[at : at + 1])]))
        for step in steps:
            assert torch.equal(through(parts, caches, step), whole.forward(step, cache))
    finally:
        for model in (whole, *parts):
            model.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_in_as_many_parts_as_can_be_has_the_bits_of_the_whole(name: str) -> None:
    assert_same_bits(golden_family(name).path)


@pytest.mark.parametrize("name", ["v41-a", "v41-b", "v41-c"])
def test_v41_in_as_many_parts_as_can_be_has_the_bits_of_the_whole(name: str) -> None:
    assert_same_bits(golden_path(name))


def test_v41_is_cut_only_where_no_later_layer_looks_back() -> None:
    found = {}
    for name in ("v41-a", "v41-b", "v41-c"):
        checkpoint = open_checkpoint(golden_path(name))
        found[name] = family_of(checkpoint).cuts(checkpoint)
    # v41-a: entries are made in layers 1 and 4, and layers up to the next source read them.
    assert found == {"v41-a": (1, 4), "v41-b": (1, 2, 3), "v41-c": (1, 4)}


def test_an_indexer_and_the_layers_that_share_its_choice_stay_together() -> None:
    checkpoint = open_checkpoint(golden_family("glm_moe_dsa").path)
    family = family_of(checkpoint)
    layers = family.description(checkpoint).layers  # type: ignore[attr-defined]
    for n in range(1, len(layers)):
        assert (n in family.cuts(checkpoint)) == (layers[n].attention.own_indexer is not None)


def test_a_part_holds_its_own_weights_and_no_others() -> None:
    whole, parts = whole_of(golden_path("v41-a")), parts_of(golden_path("v41-a"), [4])
    try:
        dense = [model.held_bytes["dram"]["dense"] for model in (whole, *parts)]
        tables = [model.held_bytes["dram"]["engram"] for model in (whole, *parts)]
        assert dense[0] == sum(dense[1:])
        assert tables[0] == sum(tables[1:])
        assert min(tables) > 0
    finally:
        for model in (whole, *parts):
            model.close()


def test_a_family_that_is_not_cut_says_so() -> None:
    checkpoint = open_checkpoint(golden_family("deepseek_v4").path)
    family = family_of(checkpoint)
    assert family.cuts(checkpoint) == ()
    with pytest.raises(ConfigError, match="runs on one machine only"):
        family.part(checkpoint, Span(0, 1, 2))
