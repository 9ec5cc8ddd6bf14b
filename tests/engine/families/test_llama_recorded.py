"""A recorded decode step gives the bits of the operations one by one, whatever came before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.prefix import PrefixCache
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


class Pair:
    """The same sequences twice: decoded by a program, and operation by operation."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        caches = [model.new_cache(SLOTS, CONTEXT) for _ in range(2)]
        self.replayed, self.eager = caches
        assert self.replayed.program is not None
        self.eager.program = None
        self.known = [PrefixCache(cache, 1 << 20) for cache in caches]
        self.texts: list[list[int]] = [[] for _ in range(SLOTS)]

    @property
    def caches(self) -> tuple[DecoderCache, DecoderCache]:
        return self.replayed, self.eager

    def run(self, parts: list[tuple[int, list[int]]]) -> None:
        """Compute further tokens of some slots; the logits must be the same bits."""
        batch = Batch.of([(slot, len(self.texts[slot]), ids) for slot, ids in parts])
        first, second = (self._model.forward(batch, cache) for cache in self.caches)
        assert torch.equal(first, second)
        for slot, ids in parts:
            self.texts[slot] += ids

    def drop(self, slot: int) -> None:
        """What an abort does, or an end: the slot is kept as a prefix and given to another."""
        for cache, known in zip(self.caches, self.known, strict=True):
            if len(self.texts[slot]) > 1:
                known.save(slot, self.texts[slot], "", None)
            cache.reset(slot)
        self.texts[slot] = []

    def restore(self, slot: int, ids: list[int]) -> None:
        """Begin a prompt with what is known of it."""
        lengths = {known.restore(slot, ids, "").length for known in self.known}
        assert len(lengths) == 1
        self.texts[slot] = ids[: lengths.pop()]


@settings(max_examples=30)
@given(data=st.data())
def test_prompts_decodes_aborts_and_prefixes_in_any_order(model: Decoder, data: st.DataObject) -> None:
    pair = Pair(model)
    token = st.integers(0, VOCAB - 1)
    for _ in range(data.draw(st.integers(1, 12))):
        slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
        act = data.draw(st.sampled_from(["prompt", "decode", "decode", "mixed", "drop", "restore"]))
        if act == "drop":
            pair.drop(slots[0])
            continue
        if act == "restore":
            pair.drop(slots[0])
            pair.restore(slots[0], data.draw(st.lists(token, min_size=2, max_size=8)))
        most = {"prompt": 6, "mixed": 3}.get(act, 1)
        parts = [(slot, data.draw(st.lists(token, min_size=1, max_size=most))) for slot in slots]
        pair.run([(slot, ids) for slot, ids in parts if len(pair.texts[slot]) + len(ids) <= CONTEXT])


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

    assert torch.equal(model.forward(replace(batch, logit_rows=torch.tensor([2])), other), whole[2:])


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
