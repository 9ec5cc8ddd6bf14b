"""Prompts in bfloat16: the same bits however a prompt is cut; answers are decoded exactly beside them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from engine.cache.aside import Kept
from engine.engine import Engine
from engine.families.base import Batch, Model
from engine.families.loader import Loaded, open_model
from engine.families.registry import family_of
from engine.kv_pool import WHOLE, PoolSize
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.errors import ConfigError
from quant.kernels.choice import LEVEL_VARIABLE
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer

LENGTH = 60
IDS = torch.randint(2, 200, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    try:
        NativeKernels("bf16")
    except (ConfigError, library.LibraryMissingError) as error:
        pytest.skip(str(error))
    return NativeKernels()


@pytest.fixture(scope="module")
def model(kernels: NativeKernels) -> Model:
    checkpoint = open_safetensors(golden_path("v41-a"))
    return family_of(checkpoint).load(checkpoint, kernels, MemoryBudget(1 << 30))


@pytest.mark.parametrize("chunk", [1, 7, 23])
def test_a_prompts_logits_do_not_depend_on_its_chunks(
    model: Model, kernels: NativeKernels, chunk: int
) -> None:
    with kernels.multiplying("bf16"):
        whole = model.forward(Batch.of([(0, 0, IDS)], all_logits=True), model.new_cache(1, LENGTH))
        cache = model.new_cache(1, LENGTH)
        parts = [(0, at, IDS[at : at + chunk]) for at in range(0, LENGTH, chunk)]
        cut = [model.forward(Batch.of([part], all_logits=True), cache).clone() for part in parts]
    exact = model.forward(Batch.of([(0, 0, IDS)], all_logits=True), model.new_cache(1, LENGTH))

    assert torch.equal(torch.cat(cut), whole)
    assert not torch.equal(exact, whole)


def answers(
    model: Model, kernels: NativeKernels, *, together: int, tokens: int = 20, pool: PoolSize = WHOLE
) -> list[list[int]]:
    """Seeded answers to prompts that are computed in bfloat16, so many sequences at a time."""
    opened = open_model(golden_path("v41-a"))
    loaded = Loaded(model, opened.tokenizer, opened.chat, opened.components, opened.sampling)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_sequences=together,
        max_context=120,
        pool=pool,
        prefill_chunk=64 if together == 1 else 9,
        prompt_products=partial(kernels.multiplying, "bf16"),
    )
    engine.start()
    try:
        found = []
        for number in range(8):
            answer = Answer()
            params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, seed=number)
            engine.submit([*IDS[: 5 + 6 * number], 9], params, answer)
            found.append(answer)
            if together == 1:
                answer.wait()
        return [answer.wait().token_ids for answer in found]
    finally:
        engine.stop()


@pytest.mark.slow
def test_a_seeded_answer_is_the_same_beside_prompts_as_alone(model: Model, kernels: NativeKernels) -> None:
    assert answers(model, kernels, together=4) == answers(model, kernels, together=1)


@pytest.mark.slow
def test_an_answer_that_was_put_aside_and_is_computed_again_is_the_same(
    model: Model, kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def put_aside(sequence: Sequence, kept: Kept | None) -> None:
        held.append(sequence.generated)
        original(sequence, kept)

    original = Sequence.put_aside
    monkeypatch.setattr(Sequence, "put_aside", put_aside)
    short = PoolSize(model.new_cache(1, 120).pages.nbytes(160), is_given=True)
    found = answers(model, kernels, together=4, tokens=60, pool=short)
    assert found == answers(model, kernels, together=1, tokens=60)
    assert any(held)  # it had an answer's tokens, too


def test_a_machine_without_such_kernels_says_so_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "portable")
    with pytest.raises(ConfigError, match="use exact products"):
        open_model(golden_path("v41-a")).load(MemoryBudget(0), "bf16")
