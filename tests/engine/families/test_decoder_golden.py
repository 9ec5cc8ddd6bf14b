"""Every decoder family against the reference logits of its golden checkpoint, however it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from engine.families.base import Batch, Trace
from engine.families.decoder.description import Mla
from engine.families.decoder.forward import Decoder
from engine.families.loader import open_checkpoint
from engine.families.shapes import shape_of
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.golden_families import (
    NAMES,
    SEQUENCES,
    Golden,
    assert_close,
    assert_right_experts,
    assert_right_in_a_batch,
    family_path,
    golden_family,
    greedy_ids,
    loaded,
    logits_in_chunks,
)

LEVELS = library.available_levels() if library.library_path() is not None else ()


# Sets whose families have tests of their own, or do not run yet.
ELSEWHERE = {"deepseek_v4", "qwen3_5_moe", "qwen3_next"}


@dataclass(frozen=True)
class Subject:
    """A golden set and its model, on the chosen kernels."""

    golden: Golden
    model: Decoder


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    golden = golden_family(request.param)
    with loaded(golden.path, choose()) as model:
        yield Subject(golden, model)


@pytest.mark.parametrize("which", SEQUENCES)
def test_logits_of_a_whole_prompt_match_at_every_position(subject: Subject, which: str) -> None:
    golden = subject.golden
    found = logits_in_chunks(subject.model, golden.ids(which), [len(golden.ids(which))])
    assert_close(found, golden.logits(which))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_logits_do_not_depend_on_how_the_prompt_is_cut(subject: Subject, size: int) -> None:
    assert_close(logits_in_chunks(subject.model, subject.golden.ids(), [size]), subject.golden.logits())


@pytest.mark.parametrize("which", SEQUENCES)
def test_the_greedy_continuation_is_the_references(subject: Subject, which: str) -> None:
    expected = subject.golden.greedy(which)
    assert greedy_ids(subject.model, subject.golden.ids(which), len(expected)) == expected


def test_sequences_of_different_lengths_share_a_batch_without_noticing(subject: Subject) -> None:
    assert_right_in_a_batch(subject.golden, subject.model)


def test_routers_choose_the_experts_of_the_reference_with_its_weights(subject: Subject) -> None:
    golden, trace = subject.golden, Trace()
    ids = golden.ids()
    subject.model.forward(Batch.of([(0, 0, ids)]), subject.model.new_cache(1, len(ids)), trace)
    layers = subject.model.description.expert_layers
    assert [f"router_ids.{n}" in golden.expected for n in layers] == [True] * len(layers)
    assert_right_experts(golden, trace, layers)


def test_indexers_choose_the_tokens_of_the_reference(subject: Subject) -> None:
    golden, model, trace = subject.golden, subject.model, Trace()
    ids = golden.ids()
    cache = model.new_cache(1, len(ids))
    for start in range(0, len(ids), 64):
        model.forward(Batch.of([(0, start, ids[start : start + 64])]), cache, trace)
    attentions = [layer.attention for layer in model.description.layers]
    indexed = [n for n, a in enumerate(attentions) if isinstance(a, Mla) and a.own_indexer]
    assert indexed == [n for n in range(len(attentions)) if f"index_selected.{n}" in golden.expected]
    for n in indexed:
        found = torch.zeros(len(ids), len(ids) + 1, dtype=torch.uint8)
        parts = trace.values[f"index_selected.{n}"]
        for part, rows in zip(parts, found.split(64), strict=True):
            rows.scatter_(1, part.where(part >= 0, len(ids)), 1)
        assert torch.equal(found[:, :-1], golden.expected[f"index_selected.{n}"])


def test_the_cache_is_as_large_as_was_said(subject: Subject) -> None:
    assert subject.model.cache_bytes(3, 50) == subject.model.new_cache(3, 50).nbytes


def test_the_plan_knows_what_each_layer_keeps_of_a_sequence(subject: Subject) -> None:
    layout = subject.model.cache_layout
    for layer, shape in enumerate(shape_of(open_checkpoint(subject.golden.path)).layers):
        for context in (10, 4000):
            assert shape.kv.nbytes(context) == layout.layer_bytes(layer, 1, context)


@pytest.mark.parametrize("name", NAMES)
def test_plain_torch_gives_the_logits_too(name: str) -> None:
    golden = golden_family(name)
    with loaded(golden.path, ReferenceKernels()) as model:
        assert_close(logits_in_chunks(model, golden.ids(), [64]), golden.logits())


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["torch", *LEVELS])
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_path_gives_the_logits_however_they_are_asked_for(name: str, kernels: str) -> None:
    golden = golden_family(name)
    ids = golden.ids()
    chosen = ReferenceKernels() if kernels == "torch" else NativeKernels(level=kernels)
    with loaded(golden.path, chosen) as model:
        for size in (1, 7, 64, len(ids)):
            assert_close(logits_in_chunks(model, ids, [size]), golden.logits())
        assert_right_in_a_batch(golden, model)
        assert greedy_ids(model, ids, 16) == golden.greedy()


def test_no_golden_set_is_left_out() -> None:
    sets = {folder.parent.name for folder in family_path(NAMES[0]).parent.glob("*/expected.safetensors")}
    assert sets <= {*NAMES, *ELSEWHERE}
