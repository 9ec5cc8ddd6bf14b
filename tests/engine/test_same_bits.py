"""A token gets the same bits however its prompt is cut, in any company, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.prefix import PrefixCache
from engine.engine import Engine
from engine.families.base import Batch, Model
from engine.families.loader import Loaded, load
from engine.families.registry import family_of
from engine.sampling.params import SamplingParams
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.gguf_files import open_gguf
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer
from tests.engine.families.golden_families import family_path
from tests.engine.families.tiny_llama import VOCAB, tiny_values, write_gguf, write_safetensors

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

LENGTH = 60  # of the prompts
SLOTS = 4
# Of latent attention: with and without a latent of queries, and over chosen tokens; windows and entries;
# and of states.
QUICK = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "deepseek_v4", "qwen3_5_moe")
FAMILIES = (*QUICK, "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "mixtral", "olmoe", "qwen3_moe")
NAMES = (
    *("v41-a", "v41-c", "llama f32", "llama q8_0", *QUICK),
    *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK),
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    loaded: dict[str, Model] = {}
    folder = tmp_path_factory.mktemp("tiny")

    def checkpoint(name: str) -> Checkpoint:
        if name == "llama f32":
            return open_safetensors(write_safetensors(folder / "hf", tiny_values()))
        if name == "llama q8_0":
            return open_gguf(write_gguf(folder / "tiny.gguf", tiny_values(), "Q8_0"))
        return open_safetensors(family_path(name) if name in FAMILIES else golden_path(name))

    def get(name: str) -> Model:
        if name not in loaded:
            opened = checkpoint(name)
            loaded[name] = family_of(opened).load(opened, NativeKernels(), MemoryBudget(1 << 30))
        return loaded[name]

    return get


def some_ids(seed: int) -> list[int]:
    return torch.randint(2, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()


IDS = some_ids(1)
_alone: dict[str, torch.Tensor] = {}


def alone(model: Model, name: str) -> torch.Tensor:
    """Logits of the prompt computed as a whole, by itself, on one thread: `[LENGTH, vocab]`."""
    if name not in _alone:
        with threads(1):
            _alone[name] = model.forward(Batch.of([(0, 0, IDS)], all_logits=True), model.new_cache(1, LENGTH))
    return _alone[name]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(data=st.data())
def test_logits_do_not_depend_on_chunks_company_or_threads(
    models: Callable[[str], Model], name: str, data: st.DataObject
) -> None:
    model = models(name)
    expected = alone(model, name)
    cache = model.new_cache(SLOTS, LENGTH)
    slot = data.draw(st.integers(0, SLOTS - 1), label="slot")
    while (start := cache.length(slot)) < LENGTH:
        parts = []
        for other in range(SLOTS):
            held = cache.length(other)
            takes_part = other == slot or data.draw(st.booleans(), label="takes part")
            if takes_part and held < LENGTH:
                length = min(data.draw(st.sampled_from([1, 2, 7, 19, LENGTH]), label="length"), LENGTH - held)
                ids = IDS if other == slot else some_ids(other + 2)
                parts.append((other, held, ids[held : held + length]))
        with threads(data.draw(st.integers(1, 4), label="threads")):
            logits = model.forward(Batch.of(parts, all_logits=True), cache)
        first = sum(len(ids) for other, _, ids in parts if other < slot)
        found = logits[first : first + cache.length(slot) - start]
        assert torch.equal(found, expected[start : cache.length(slot)])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(cut=st.integers(1, LENGTH - 1), chunk=st.integers(1, LENGTH))
def test_logits_behind_a_restored_prefix_are_those_of_the_whole_prompt(
    models: Callable[[str], Model], name: str, cut: int, chunk: int
) -> None:
    model = models(name)
    cache = model.new_cache(2, LENGTH)
    prefixes = PrefixCache(cache, 1 << 26)
    for start in range(0, cut, chunk):
        model.forward(Batch.of([(0, start, IDS[start : min(start + chunk, cut)])]), cache)
    prefixes.save(0, IDS[:cut])

    restored = prefixes.restore(1, IDS).length
    logits = model.forward(Batch.of([(1, restored, IDS[restored:])], all_logits=True), cache)

    assert restored == cut
    assert torch.equal(logits, alone(model, name)[cut:])


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(golden_path("v41-a"))


def answers(loaded: Loaded, requests: list[dict[str, Any]], *, together: int) -> list[list[int]]:
    """Sampled answers to the requests, `together` of them at a time."""
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_sequences=together,
        max_context=120,
        prefill_chunk=64 if together == 1 else 23,
        prefix_cache_bytes=0 if together == 1 else 1 << 24,
    )
    engine.start()
    try:
        found = []
        for request in requests:
            answer = Answer()
            params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, **request["params"])
            engine.submit(request["ids"], params, answer)
            found.append(answer)
            if together == 1:
                answer.wait()
        return [answer.wait().token_ids for answer in found]
    finally:
        engine.stop()


@pytest.mark.slow
def test_a_seeded_answer_is_the_same_alone_and_in_company(loaded: Loaded) -> None:
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(5, 200, (70,), generator=generator).tolist()
    requests = [
        {
            "ids": [*prompt[: 5 + 13 * (number % 5)], *torch.randint(5, 200, (number % 9,)).tolist(), 9],
            "params": {"seed": number, "top_p": (1.0, 0.9)[number % 2], "top_k": (0, 40, 100)[number % 3]},
        }
        for number in range(60)
    ]

    assert answers(loaded, requests, together=6) == answers(loaded, requests, together=1)
