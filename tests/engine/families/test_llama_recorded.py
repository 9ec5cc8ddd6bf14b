"""A recorded decode step gives the bits of the operations one by one, whatever came before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.families.base import Batch
from engine.families.decoder.cache import DecoderCache
from engine.families.decoder.forward import MAX_ROWS, Decoder
from engine.families.llama import FAMILY
from memory.checkpoint.gguf_files import open_gguf
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.recorded_pairs import Pair
from tests.engine.families.tiny_llama import CONTEXT, VOCAB, tiny_values, write_gguf, write_safetensors

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

SLOTS = 4


@pytest.fixture(scope="module", params=["Q8_0", "Q4_1", "bf16 directory", "stretched"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("tiny")
    if request.param == "bf16 directory":
        checkpoint = open_safetensors(write_safetensors(folder / "hf", tiny_values(is_tied=False)))
    elif request.param == "stretched":
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        checkpoint = open_safetensors(
            write_safetensors(folder / "hf", tiny_values(), {"rope_scaling": scaling})
        )
    else:
        checkpoint = open_gguf(write_gguf(folder / "tiny.gguf", tiny_values(), request.param))
    return FAMILY.load(checkpoint, NativeKernels(), MemoryBudget(1 << 30))


def forget(cache: DecoderCache) -> None:
    assert cache.program is not None
    cache.program = None


@settings(max_examples=30)
@given(data=st.data())
def test_prompts_decodes_aborts_and_prefixes_in_any_order(model: Decoder, data: st.DataObject) -> None:
    pair = Pair(model, lambda: model.new_cache(SLOTS, CONTEXT), forget)
    pair.do_anything(data, VOCAB, CONTEXT)


def test_more_sequences_than_a_program_takes_are_computed_all_the_same(model: Decoder) -> None:
    rows = MAX_ROWS + 3
    cache, eager = model.new_cache(rows, 8), model.new_cache(rows, 8)
    eager.program = None
    batch = Batch.of([(slot, 0, [slot]) for slot in range(rows)])

    assert torch.equal(model.forward(batch, cache), model.forward(batch, eager))


def test_only_the_rows_asked_for_get_logits_of_a_recorded_step(model: Decoder) -> None:
    one, other = model.new_cache(3, 8), model.new_cache(3, 8)
    batch = Batch.of([(slot, 0, [slot + 5]) for slot in range(3)])
    whole = model.forward(batch, one)

    assert torch.equal(model.forward(replace(batch, wanted=[2]), other), whole[2:])


def test_a_step_that_does_not_fit_leaves_the_cache_as_it_was(model: Decoder) -> None:
    cache = model.new_cache(1, 2)
    model.forward(Batch.of([(0, 0, [1, 2])]), cache)

    with pytest.raises(Exception, match="do not fit"):
        model.forward(Batch.of([(0, 2, [3])]), cache)
    assert cache.length(0) == 2


def test_logits_stay_what_they_are_when_the_next_step_is_computed(model: Decoder) -> None:
    cache = model.new_cache(1, 4)
    first = model.forward(Batch.of([(0, 0, [1])]), cache)
    kept = first.clone()
    model.forward(Batch.of([(0, 1, [2])]), cache)

    assert torch.equal(first, kept)


def test_a_programs_buffers_are_counted_with_the_cache(model: Decoder) -> None:
    cache = model.new_cache(3, 17)

    assert isinstance(cache, DecoderCache)
    assert cache.program is not None
    assert cache.program.nbytes > 4 * MAX_ROWS * VOCAB
    assert model.cache_bytes(3, 17) == cache.nbytes


def test_plain_torch_records_nothing(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_gguf(tmp_path / "tiny.gguf", tiny_values(), "Q8_0"))
    model = FAMILY.load(checkpoint, ReferenceKernels(), MemoryBudget(1 << 30))
    cache = model.new_cache(1, 4)

    assert cache.program is None
    assert model.cache_bytes(1, 4) == cache.nbytes
    assert model.forward(Batch.of([(0, 0, [1])]), cache).shape == (1, VOCAB)
