"""What was computed before is not computed again, and nobody can tell by the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.prefix import PrefixCache
from engine.cache.shared_rows import Kept
from engine.engine import Engine
from engine.families.base import Batch, KvCache, Model
from engine.families.loader import Loaded, load
from engine.families.registry import family_of
from engine.sampling.params import SamplingParams
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.gguf_files import open_gguf
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from memory.planner.published import KV_MARGIN
from quant.kernels.choice import choose
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer
from tests.engine.families.golden_families import family_path
from tests.engine.families.tiny_llama import VOCAB, tiny_values, write_gguf

PLENTY = 1 << 26
FAMILIES = ("deepseek_v4", "gpt_oss", "qwen3_next")
NAMES = ("v41-a", "v41-c", "llama", *FAMILIES)
LENGTH = 60  # of the prompts here: several windows, groups of compressed entries, and query blocks' starts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    loaded: dict[str, Model] = {}

    def checkpoint(name: str) -> Checkpoint:
        if name in FAMILIES:
            return open_safetensors(family_path(name))
        if name != "llama":
            return open_safetensors(golden_path(name))
        return open_gguf(write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_values(), "Q4_1"))

    def get(name: str) -> Model:
        if name not in loaded:
            opened = checkpoint(name)
            loaded[name] = family_of(opened).load(opened, choose(), MemoryBudget(1 << 30))
        return loaded[name]

    return get


def some_ids(seed: int, count: int = LENGTH) -> list[int]:
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compute(model: Model, cache: KvCache, slot: int, start: int, ids: list[int]) -> torch.Tensor:
    return model.forward(Batch.of([(slot, start, ids)], all_logits=True), cache)


def spoil(model: Model, cache: KvCache, slot: int) -> None:
    """Leave the slot as another sequence would."""
    cache.reset(slot)
    compute(model, cache, slot, 0, some_ids(99, cache.capacity))
    cache.reset(slot)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(data=st.data())
def test_going_on_from_a_restored_prefix_gives_the_very_same_bits(
    models: Callable[[str], Model], name: str, data: st.DataObject
) -> None:
    """At any cut, however the prompt was chunked before and after it."""
    model = models(name)
    ids = some_ids(1)
    cache = model.new_cache(2, 64)
    cut = data.draw(st.integers(1, LENGTH - 1), label="cut")
    points = sorted({0, cut, LENGTH, *data.draw(st.lists(st.integers(1, LENGTH - 1), max_size=4))})
    prefixes = PrefixCache(cache, PLENTY)

    uncached = []
    for start, stop in pairwise(points):
        uncached.append(compute(model, cache, 0, start, ids[start:stop]))
        if stop == cut:
            prefixes.save(0, ids[:cut])
    spoil(model, cache, 1)
    prefix = prefixes.restore(1, ids)
    cached = [
        compute(model, cache, 1, start, ids[start:stop]) for start, stop in pairwise(points) if start >= cut
    ]

    assert prefix.length == cut == cache.length(1) - (LENGTH - cut)
    assert torch.equal(torch.cat(cached), torch.cat(uncached)[cut:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_position_can_be_gone_on_from(models: Callable[[str], Model], name: str) -> None:
    """Behind and before the ends of windows and groups: the next token's logits are the very same."""
    model = models(name)
    ids = some_ids(1, 40)
    cache = model.new_cache(2, 40)
    prefixes = PrefixCache(cache, PLENTY)
    for at, token in enumerate(ids):
        if at:
            prefixes.save(0, ids[:at])
        cache.reset(1)
        assert prefixes.restore(1, ids[: at + 1]).length == at
        expected = compute(model, cache, 0, at, [token])
        assert torch.equal(compute(model, cache, 1, at, [token]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(data=st.data())
def test_whatever_was_saved_and_evicted_the_state_that_comes_back_is_the_prompts_own(
    models: Callable[[str], Model], name: str, data: st.DataObject
) -> None:
    """Prompts that share beginnings, states saved anywhere in any order, a budget that holds few of them."""
    model = models(name)
    cache = model.new_cache(2, 64)
    budget = data.draw(st.integers(2_000, 400_000), label="budget")
    prefixes = PrefixCache(cache, budget)
    stems = [some_ids(1), some_ids(2)]
    for _ in range(data.draw(st.integers(2, 10), label="requests")):
        shared = data.draw(st.integers(0, LENGTH), label="shared")
        stem = data.draw(st.sampled_from(stems), label="stem")
        ids = (stem[:shared] + some_ids(data.draw(st.integers(3, 4), label="tail")))[:LENGTH]
        salt = data.draw(st.sampled_from(["", "other"]), label="salt")

        spoil(model, cache, 0)
        prefix = prefixes.restore(0, ids, salt)
        start = prefix.length
        if prefix.logits is None:
            cut = (*prefix.stops, None)[0] or data.draw(st.integers(start + 1, LENGTH), label="cut")
            logits = compute(model, cache, 0, start, ids[start:cut])
            prefixes.save(0, ids[:cut], salt, logits[-1] if data.draw(st.booleans()) else None)
            cache.reset(1)
            expected = compute(model, cache, 1, 0, ids[:cut])[-1]
            torch.testing.assert_close(logits[-1], expected, atol=1e-4, rtol=0)
        else:
            cache.reset(1)
            expected = compute(model, cache, 1, 0, ids)[-1]
            torch.testing.assert_close(prefix.logits, expected, atol=1e-4, rtol=0)
        assert prefixes.stats.nbytes == held_bytes(prefixes) <= budget


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v41-a", "v41-c", "deepseek_v4", "gpt_oss"])
@pytest.mark.parametrize("taken_back", [1, 2, 3, 4, 7, 8, 15, 16])
def test_a_state_can_be_taken_back_by_a_few_tokens(
    models: Callable[[str], Model], name: str, taken_back: int
) -> None:
    """A chat's prompt ends with tokens that open the answer; the next turn has others there."""
    model = models(name)
    ids, other = some_ids(1, 33), [1, *some_ids(2, 5)]  # no prompt has the 1
    kept = len(ids) - taken_back
    cache = model.new_cache(3, 64)
    prefixes, later_ones = PrefixCache(cache, PLENTY), PrefixCache(cache, PLENTY)
    for at, token in enumerate(ids):
        compute(model, cache, 0, at, [token])
    for at, token in enumerate([*ids[:kept], other[0]]):
        uncached = compute(model, cache, 1, at, [token])

    prefixes.save(0, ids)
    prefix = prefixes.restore(2, ids[:kept] + other)
    later_ones.save(2, ids[:kept])
    further_back = later_ones.restore(1, ids[: len(ids) - cache.margin - 1] + other)

    assert (prefix.length, further_back.length) == (kept, 0)
    assert torch.equal(compute(model, cache, 2, kept, other[:1]), uncached)


def really(kept: Kept) -> int:
    """Bytes that are allocated for it."""
    return kept.untyped_storage().nbytes() if isinstance(kept, torch.Tensor) else kept.nbytes


def held_bytes(prefixes: PrefixCache) -> int:
    """What the tree really holds."""
    nodes, total = list(prefixes._roots.values()), 0
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        tensors = [*node.rows, *(node.recent or ())] + ([] if node.logits is None else [node.logits])
        total += node.tokens.nbytes + sum(map(really, tensors))
    return total


def test_prompts_that_part_are_told_where(models: Callable[[str], Model]) -> None:
    model = models("v41-a")
    cache = model.new_cache(1, 64)
    prefixes = PrefixCache(cache, PLENTY)
    first = some_ids(1)
    second = first[:40] + some_ids(2, 20)
    compute(model, cache, 0, 0, first)
    prefixes.save(0, first)

    cache.reset(0)
    seen = prefixes.restore(0, second)
    compute(model, cache, 0, 0, second[:40])
    prefixes.save(0, second[:40])
    cache.reset(0)
    third = prefixes.restore(0, first[:40] + some_ids(3, 20))

    assert (seen.length, seen.stops) == (0, (40,))
    assert (third.length, third.stops) == (40, ())


def test_a_hash_that_agrees_is_not_enough_tokens_must(models: Callable[[str], Model]) -> None:
    model = models("llama")
    cache = model.new_cache(1, 64)
    prefixes = PrefixCache(cache, PLENTY)
    ids = some_ids(1)
    compute(model, cache, 0, 0, ids)
    prefixes.save(0, ids)
    cache.reset(0)

    other = [*ids[:20], (ids[20] + 1) % VOCAB, *ids[21:]]

    assert prefixes.restore(0, other).length == 20


def test_the_least_recently_used_goes_first(models: Callable[[str], Model]) -> None:
    model = models("v41-a")
    cache = model.new_cache(1, 64)
    prefixes = PrefixCache(cache, PLENTY)
    prompts = [some_ids(seed, 30) for seed in range(3)]
    sizes = []
    for ids in prompts:
        cache.reset(0)
        compute(model, cache, 0, 0, ids)
        prefixes.save(0, ids)
        sizes.append(prefixes.stats.nbytes)
    tight = PrefixCache(cache, sizes[1])
    for ids in (prompts[0], prompts[1], [*prompts[0], 5], prompts[2]):
        cache.reset(0)
        start = tight.restore(0, ids).length
        compute(model, cache, 0, start, ids[start:])
        if len(ids) == 30:
            tight.save(0, ids)

    cache.reset(0)
    lengths = []
    for ids in prompts:
        cache.reset(0)
        lengths.append(tight.restore(0, [*ids, 5]).length)
    assert lengths == [30, 0, 30]
    assert tight.stats.evictions == 1


def test_a_state_larger_than_the_budget_is_not_saved_and_throws_nothing_out(
    models: Callable[[str], Model],
) -> None:
    model = models("v41-a")
    cache = model.new_cache(1, 64)
    compute(model, cache, 0, 0, some_ids(1, 10))
    roomy = PrefixCache(cache, PLENTY)
    roomy.save(0, some_ids(1, 10))
    prefixes = PrefixCache(cache, roomy.stats.nbytes)
    prefixes.save(0, some_ids(1, 10))

    cache.reset(0)
    compute(model, cache, 0, 0, some_ids(2))
    prefixes.save(0, some_ids(2))
    cache.reset(0)

    assert prefixes.restore(0, some_ids(1, 11)).length == 10
    assert prefixes.stats.evictions == 0


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(golden_path("v41-c"))


def engine_of(loaded: Loaded, prefix_cache_bytes: int) -> Engine:
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_sequences=2,
        max_context=300,
        prefill_chunk=64,
        prefix_cache_bytes=prefix_cache_bytes,
    )
    engine.start()
    return engine


@pytest.fixture
def engine(loaded: Loaded) -> Iterator[Engine]:
    started = engine_of(loaded, PLENTY)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def plain(loaded: Loaded) -> Iterator[Engine]:
    started = engine_of(loaded, 0)
    yield started
    started.stop()


def ask(engine: Engine, ids: list[int], salt: str = "", **params: Any) -> Answer:
    answer = Answer()
    wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": 10, "ignore_eos": True, **params})
    engine.submit(ids, wanted, answer, cache_salt=salt)
    return answer.wait()


def cached(answer: Answer) -> int | None:
    return answer.outputs[0].cached_tokens


def test_a_prompt_asked_again_is_not_computed_again(engine: Engine, plain: Engine) -> None:
    ids = some_ids(1, 150)
    first, again = ask(engine, ids, logprobs=0), ask(engine, ids, logprobs=0)

    assert (cached(first), cached(again)) == (0, 150)
    assert engine.stats().prompt_tokens == 150
    assert again.token_ids == first.token_ids == ask(plain, ids).token_ids
    assert again.outputs[0].logprobs == first.outputs[0].logprobs


def test_the_next_turn_goes_on_where_a_state_that_cannot_be_taken_back_was_kept() -> None:
    """A chat's prompt ends with tokens that open the answer; the next turn has others there."""
    loaded = load(family_path("qwen3_next"))
    first, second = some_ids(1, 100), [*some_ids(1, 96), *some_ids(2, 30)]
    engines = [engine_of(loaded, size) for size in (PLENTY, 0)]
    answers = [[ask(engine, ids) for ids in (first, second)] for engine in engines]
    for engine in engines:
        engine.stop()

    assert [cached(answer) for answer in answers[0]] == [0, 100 - KV_MARGIN]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]


def test_a_prompt_that_is_being_computed_is_not_begun_a_second_time(engine: Engine, plain: Engine) -> None:
    ids = some_ids(1, 200)
    answers = [Answer() for _ in range(5)]
    for seed, answer in enumerate(answers):
        params = SamplingParams(temperature=1.0, seed=seed % 2, max_tokens=8, ignore_eos=True)
        engine.submit(ids, params, answer)

    tokens = [answer.wait().token_ids for answer in answers]

    assert [cached(answer) for answer in answers] == [0, 200, 200, 200, 200]
    assert engine.stats().prompt_tokens == 200
    assert (
        tokens[0]
        == tokens[2]
        == tokens[4]
        == ask(plain, ids, temperature=1.0, seed=0, max_tokens=8).token_ids
    )
    assert tokens[1] == tokens[3] != tokens[0]


def test_the_next_turn_of_a_conversation_goes_on_behind_the_last_answer(
    engine: Engine, plain: Engine
) -> None:
    prompt = some_ids(1, 100)
    first = ask(engine, prompt)
    turn = prompt + first.token_ids + some_ids(2, 30)

    second = ask(engine, turn)

    assert cached(second) == 109  # the last token of an answer is never computed
    assert second.token_ids == ask(plain, turn).token_ids


def test_a_shared_system_prompt_is_computed_twice_and_then_never_again(engine: Engine, plain: Engine) -> None:
    system = some_ids(1, 100)
    prompts = [system + some_ids(seed, 20) for seed in (2, 3, 4, 5)]

    answers = [ask(engine, ids) for ids in prompts]

    assert [cached(answer) for answer in answers] == [0, 0, 100, 100]
    assert [a.token_ids for a in answers] == [ask(plain, ids).token_ids for ids in prompts]


def test_log_probabilities_of_a_prompt_are_complete_although_it_is_known(engine: Engine) -> None:
    ids = some_ids(1, 80)
    ask(engine, ids)

    scored = ask(engine, ids, prompt_logprobs=0)

    assert cached(scored) == 0
    assert len(scored.outputs[0].prompt_logprobs or ()) == 80


def test_salted_prompts_are_known_to_their_own_salt_only(engine: Engine) -> None:
    ids = some_ids(1, 80)
    ask(engine, ids, "mine")

    assert cached(ask(engine, ids)) == 0
    assert cached(ask(engine, ids, "yours")) == 0
    assert cached(ask(engine, ids, "mine")) == 80


def test_without_a_budget_nothing_is_kept(plain: Engine) -> None:
    ids = some_ids(7, 80)

    assert [cached(ask(plain, ids)) for _ in range(2)] == [0, 0]
    assert plain.stats().prefixes is None


def test_what_the_cache_did_is_counted(engine: Engine) -> None:
    ids = some_ids(1, 80)
    for _ in range(3):
        ask(engine, ids)

    prefixes = engine.stats().prefixes
    assert prefixes is not None
    assert (prefixes.queries, prefixes.hits, prefixes.cached_tokens) == (3, 2, 160)
    assert 0 < prefixes.nbytes <= prefixes.budget_bytes == PLENTY
