"""A decoder's recorded step gives the bits of its operations one by one, wherever its experts lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.families.decoder.cache import DecoderCache
from engine.families.decoder.forward import Decoder
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from tests.engine.families.golden_families import PLENTY, golden_family, loaded
from tests.engine.families.recorded_pairs import Pair
from tests.engine.families.test_decoder_tiers import budget

pytestmark = [
    pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built"),
    pytest.mark.slow,
]

SLOTS, CONTEXT = 3, 40
# Softmax with norms per head, groups with a shared expert, biases with sinks and windows, latent attention,
# the same over chosen tokens, and with layers that share a choice; states.
NAMES = ("qwen3_moe", "glm4_moe", "gpt_oss", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "qwen3_next")


@pytest.fixture(scope="module", params=itertools.product(NAMES, ["all", "disk", "gpus"]))
def model(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    name, held = request.param
    golden = golden_family(name)
    limits = {"all": PLENTY, "disk": budget(golden, 14), "gpus": budget(golden, 6, 4, 5)}[held]
    with loaded(golden.path, NativeKernels(), limits) as found:
        yield found


def forget(cache: DecoderCache) -> None:
    assert cache.program is not None
    cache.program = None


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_prompts_decodes_aborts_and_prefixes_in_any_order(model: Decoder, data: st.DataObject) -> None:
    pair = Pair(model, lambda: model.new_cache(SLOTS, CONTEXT), forget)
    pair.do_anything(data, model.info.vocab_size, CONTEXT, longest=20)


def test_where_experts_in_panels_stay_in_dram_nothing_is_handed_over(model: Decoder) -> None:
    program, store = model.new_cache(1, 4).program, model.weights.experts
    assert program is not None
    assert store is not None
    if store.is_still and store.at_hand is not None:
        assert "hand_over" not in {noted.kind for noted in program.noted}
    else:
        assert program.hand_overs
