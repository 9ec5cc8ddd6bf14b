"""V4's recorded decode step gives the bits of its operations one by one, wherever the experts lie."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.families.deepseek_v4.family import FAMILY
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.loader import open_checkpoint
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.reference import ReferenceKernels
from tests.engine.families.golden_families import PLENTY, golden_family
from tests.engine.families.recorded_pairs import Pair
from tests.engine.families.recorded_streams import (
    assert_any_number_of_sequences_is_computed,
    failures,
    forget,
    program_of,
)
from tests.engine.families.test_decoder_tiers import budget

pytestmark = [
    pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built"),
    pytest.mark.slow,
]

SLOTS, CONTEXT = 3, 64


@pytest.fixture(scope="module", params=["all", "disk", "gpus"])
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekV4]:
    golden = golden_family("deepseek_v4")
    limits = {"all": PLENTY, "disk": budget(golden, 14), "gpus": budget(golden, 6, 4, 5)}[request.param]
    found = FAMILY.load(open_checkpoint(golden.path), NativeKernels(), limits)
    assert found.weights.experts.is_still == (request.param == "all")
    yield found
    found.close()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_prompts_decodes_aborts_and_prefixes_in_any_order(model: DeepseekV4, data: st.DataObject) -> None:
    pair = Pair(model, lambda: model.new_cache(SLOTS, CONTEXT), forget)
    pair.do_anything(data, model.info.vocab_size, CONTEXT, longest=24)


def test_long_sequences_pass_windows_groups_and_choices(model: DeepseekV4) -> None:
    context = 300
    pair = Pair(model, lambda: model.new_cache(2, context), forget)
    ids = golden_family("deepseek_v4").ids()
    pair.run([(0, ids[:240])])
    pair.run([(1, ids[:3])])
    for at in range(240, 280):  # the first slot passes 256, the second its first groups
        pair.run([(0, ids[at : at + 1]), (1, ids[at - 237 : at - 236])])


def test_more_sequences_than_a_program_takes_are_computed_all_the_same(model: DeepseekV4) -> None:
    assert_any_number_of_sequences_is_computed(model)


def test_where_experts_stay_in_dram_nothing_is_handed_over(model: DeepseekV4) -> None:
    program, store = model.new_cache(1, 4).program, model.weights.experts
    assert program is not None
    if store.is_still:
        assert "hand_over" not in {noted.kind for noted in program.noted}
    else:
        assert program.hand_overs


def test_a_step_that_fails_at_any_hand_over_can_be_computed_again(model: DeepseekV4) -> None:
    cache = model.new_cache(1, 16)
    failures(model, cache, list(program_of(cache).hand_overs))


def test_plain_torch_records_nothing() -> None:
    path = golden_family("deepseek_v4").path
    loaded = FAMILY.load(open_checkpoint(path), ReferenceKernels(), PLENTY)
    assert loaded.new_cache(1, 4).decoder is None
    loaded.close()
