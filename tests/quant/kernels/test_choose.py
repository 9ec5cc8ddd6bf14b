"""The native choice of experts is that of torch: scores, groups, biases, ties and weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.layers import Choice
from quant.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

CHOICES = [
    Choice(3, "softmax"),
    Choice(3, "softmax", is_renormalised=True),
    Choice(1, "chosen softmax"),
    Choice(5, "chosen softmax", factor=2.0),
    Choice(4, "sigmoid", is_renormalised=True, factor=2.5),
    Choice(4, "sigmoid", groups=4, kept=2, best=2, is_renormalised=True),
    Choice(6, "softmax", groups=3, kept=1, best=1, factor=16.0),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_experts_and_weights_are_those_of_torch(choice: Choice, has_bias: bool) -> None:
    logits = torch.randn(33, 24, generator=torch.Generator().manual_seed(4)) * 2
    bias = torch.linspace(-0.5, 0.3, 24) if has_bias else None
    ids, weights = NativeKernels().choose(logits, bias, choice)
    expected_ids, expected = ReferenceKernels().choose(logits, bias, choice)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)


@given(token=st.integers(0, 19), count=st.integers(1, 20))
def test_a_tokens_choice_does_not_depend_on_its_company(token: int, count: int) -> None:
    logits = torch.randn(20, 17, generator=torch.Generator().manual_seed(5))
    first = min(token, 20 - count)
    for choice in CHOICES[:5]:
        whole, part = (
            NativeKernels().choose(x, None, choice) for x in (logits, logits[first : first + count])
        )
        if token - first < count:
            assert torch.equal(whole[0][token], part[0][token - first])
            assert torch.equal(whole[1][token], part[1][token - first])


@pytest.mark.parametrize("kernels", [NativeKernels, ReferenceKernels])
def test_of_equal_scores_the_first_experts_win(kernels: type[NativeKernels | ReferenceKernels]) -> None:
    ids, weights = kernels().choose(torch.zeros(2, 9), None, Choice(3, "sigmoid", is_renormalised=True))
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))
