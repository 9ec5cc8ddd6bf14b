"""A recorded step of a decoder family gives the bits of single operations, wherever its experts lie."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.families.base import Batch
from engine.families.decoder.forward import Decoder, DecodingCache
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from tests.engine.families.golden_families import NAMES, PLENTY, golden_family, loaded
from tests.engine.families.recorded_pairs import Pair
from tests.engine.families.test_decoder_tiers import budget

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

SLOTS, CONTEXT = 4, 40


@pytest.fixture(scope="module", params=[(name, moves) for name in NAMES for moves in (False, True)], ids=str)
def model(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    name, moves = request.param
    golden = golden_family(name)
    limits = budget(golden, 12) if moves else PLENTY
    with loaded(golden.path, NativeKernels(), limits) as model:
        yield model


def forget(cache: DecodingCache) -> None:
    assert cache.program is not None
    cache.program = None


@pytest.mark.slow
@settings(max_examples=6)
@given(data=st.data())
def test_prompts_decodes_aborts_and_prefixes_in_any_order(model: Decoder, data: st.DataObject) -> None:
    pair = Pair(model, lambda: model.new_cache(SLOTS, CONTEXT), forget)
    pair.do_anything(data, model.info.vocab_size, CONTEXT)


def test_windows_sinks_and_biases_are_recorded_as_they_are_computed() -> None:
    golden = golden_family("gpt_oss")
    ids = golden.ids()[:60]
    with loaded(golden.path, NativeKernels()) as model:
        replayed, eager = model.new_cache(1, 60), model.new_cache(1, 60)
        forget(eager)
        for at, token in enumerate(ids):
            batch = Batch.of([(0, at, [token])])
            assert torch.equal(model.forward(batch, replayed), model.forward(batch, eager)), at


def test_a_step_is_one_call_where_its_experts_are_at_hand() -> None:
    golden = golden_family("gpt_oss")
    with loaded(golden.path, NativeKernels()) as model:
        program = model.new_cache(1, 8).program
        assert program is not None
        kinds = {noted.kind for noted in program.noted}
        assert "experts" in kinds
        assert "hand_over" not in kinds
        model.forward(Batch.of([(0, 0, [1])]), cache := model.new_cache(1, 8))
        model.forward(Batch.of([(0, 1, [1])]), cache)
        assert model.telemetry is not None
        used = model.telemetry.snapshot().computed["dram"]
        assert used == 2 * len(model.description.layers) * 3


def test_experts_that_move_are_handed_over_and_read() -> None:
    golden = golden_family("gpt_oss")
    with loaded(golden.path, NativeKernels(), budget(golden, 8)) as model:
        cache = model.new_cache(1, 8)
        assert cache.program is not None
        assert "hand_over" in {noted.kind for noted in cache.program.noted}
        for at in range(4):
            model.forward(Batch.of([(0, at, [at])]), cache)
        assert model.telemetry is not None
        assert model.telemetry.snapshot().hits["nvme"] > 0
