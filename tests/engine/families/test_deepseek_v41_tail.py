"""The exact tail: amid a prompt, late layers compute only what its end looks back on, and nobody can tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.prefix import PrefixCache
from engine.engine import Engine
from engine.families.base import Batch, KvCache, Segment, Trace
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import load
from engine.families.registry import family_of
from engine.sampling.params import SamplingParams
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.kernels.choice import choose
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer

NAMES = ("v41-a", "v41-b")
CAPACITY = 700


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekV41]:
    checkpoint = open_safetensors(golden_path(request.param))
    loaded = family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(1 << 30))
    assert isinstance(loaded, DeepseekV41)
    yield loaded
    loaded.close()


def some_ids(seed: int, count: int) -> list[int]:
    return torch.randint(2, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefill(
    model: DeepseekV41, cache: KvCache, ids: list[int], cuts: list[int], *, whole: bool
) -> torch.Tensor:
    """The logits after a prompt that is computed in chunks."""
    logits = torch.empty(0)
    for start, stop in pairwise(cuts):
        wanted = [stop - start - 1] if stop == len(ids) else []
        to_come = None if whole else (len(ids) - stop,)
        batch = Batch(ids[start:stop], (Segment(0, start, stop - start),), wanted, to_come)
        logits = model.forward(batch, cache)
    return logits


def test_the_models_here_have_layers_with_a_tail(model: DeepseekV41) -> None:
    c = model.config
    assert c.first_tail_layer < c.num_hidden_layers
    assert not model.keeps_whole_states
    assert c.tail_of(c.num_hidden_layers - 1) == c.sliding_window


@pytest.mark.slow
@settings(max_examples=12)
@given(data=st.data())
def test_the_state_and_what_follows_are_the_same_bits_however_a_prompt_is_cut(
    model: DeepseekV41, data: st.DataObject
) -> None:
    c = model.config
    first = c.first_tail_layer - data.draw(st.integers(0, 1), label="with the last source")
    border = c.tail_of(first) + model.cache_shape.margin
    length = data.draw(
        st.sampled_from([border - 1, border, border + 1, 2 * border, CAPACITY - 60]), label="length"
    )
    length = min(length, CAPACITY - 60)
    middle = data.draw(st.lists(st.integers(1, length - 1), max_size=5), label="cuts")
    cuts = sorted({0, length, *middle})
    ids = some_ids(length, length)
    full, tail = model.new_cache(1, CAPACITY), model.new_cache(1, CAPACITY)
    expected = prefill(model, full, ids, cuts, whole=True)
    found = prefill(model, tail, ids, cuts, whole=False)
    assert torch.equal(found, expected)
    for a, b in zip(full.recent(0, length), tail.recent(0, length), strict=True):
        assert torch.equal(a, b)
    for (_, a), (_, b) in zip(full.appended(0), tail.appended(0), strict=True):
        assert torch.equal(a, b)
    back = data.draw(st.integers(0, model.cache_shape.margin), label="taken back")
    for cache in (full, tail):
        cache.resume(0, length - back, length - model.cache_shape.margin)
    at = length - back
    for token in some_ids(1, 40):
        steps = [model.forward(Batch.of([(0, at, [token])]), cache) for cache in (full, tail)]
        assert torch.equal(*steps)
        at += 1


def test_late_layers_compute_the_end_of_a_prompt_alone(model: DeepseekV41) -> None:
    c, margin = model.config, model.cache_shape.margin
    length = 600
    ids = some_ids(2, length)
    trace, cache = Trace(), model.new_cache(1, CAPACITY)
    for start in range(0, length, 100):
        to_come = (length - start - 100,)
        batch = Batch(ids[start : start + 100], (Segment(0, start, 100),), [], to_come)
        model.forward(batch, cache, trace)
    for layer in range(c.num_hidden_layers):
        rows = sum(len(streams) for streams in trace.values[f"streams.{layer}"])
        late = layer >= c.first_tail_layer - 1
        assert rows == (min(length, c.tail_of(layer) + margin) if late else length)


def test_tokens_whose_own_results_are_wanted_are_all_computed(model: DeepseekV41) -> None:
    ids = some_ids(3, 500)
    batch = Batch(ids, (Segment(0, 0, 500),), None, (None,))
    whole = model.forward(Batch.of([(0, 0, ids)], all_logits=True), model.new_cache(1, CAPACITY))
    assert torch.equal(model.forward(batch, model.new_cache(1, CAPACITY)), whole)


@pytest.mark.slow
def test_an_engine_restores_prompts_that_diverge_and_answers_beside_them() -> None:
    """Prompts with a common beginning, decodes between their chunks: the texts of one at a time, without
    anything kept."""
    loaded = load(golden_path("v41-a"))
    shared = some_ids(4, 300)
    prompts = [[*shared, *some_ids(seed, 200)] for seed in range(5, 11)]

    def texts(prefix_bytes: int, together: int) -> list[list[int]]:
        engine = Engine(
            loaded.model, loaded.tokenizer, max_sequences=together, max_context=CAPACITY, prefill_chunk=90,
            prefix_cache_bytes=prefix_bytes,
        )  # fmt: skip
        engine.start()
        answers = [Answer() for _ in prompts]
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        for ids, answer in zip(prompts, answers, strict=True):
            engine.submit(ids, params, answer)
        found = [answer.wait().token_ids for answer in answers]
        cached = sum(answer.outputs[0].cached_tokens or 0 for answer in answers)
        engine.stop()
        assert (cached > 0) == (prefix_bytes > 0)
        return found

    alone = texts(0, 1)
    assert texts(1 << 26, 1) == alone
    assert texts(1 << 26, 2) == alone
    loaded.model.close()


def test_a_state_amid_a_prompt_is_saved_only_where_it_is_whole(model: DeepseekV41) -> None:
    """Where the prefill was to stop; and it gives the bits of a prompt that ends there."""
    ids = some_ids(10, 600)
    cache = model.new_cache(2, CAPACITY)
    prefixes = PrefixCache(cache, 1 << 26)
    prefill(model, cache, ids[:400], [0, 150, 400], whole=False)
    prefixes.save(0, ids[:400])
    other = model.new_cache(1, CAPACITY)
    expected = prefill(model, other, ids, [0, 400, 600], whole=True)
    assert prefixes.restore(1, ids).length == 400
    batch = Batch(ids[400:], (Segment(1, 400, 200),), [199], (0,))
    assert torch.equal(model.forward(batch, cache), expected)
