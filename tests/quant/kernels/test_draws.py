"""Log probabilities, masks and draws of native code, on each instruction set, are as defined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.kernels.cpu import library
from quant.kernels.cpu.draws import Draw, NativeDraws

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

LEVELS = library.available_levels() if library.library_path() is not None else ()


@pytest.fixture(params=LEVELS)
def native(request: pytest.FixtureRequest) -> NativeDraws:
    return NativeDraws(request.param)


def logits_of(vocab: int, rows: int = 1) -> torch.Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


@pytest.mark.parametrize("vocab", [5, 512, 4096, 129_280])
def test_log_probabilities_are_those_of_the_softmax(native: NativeDraws, vocab: int) -> None:
    logits = logits_of(vocab, rows=2)
    expected = logits[1].double().log_softmax(-1)

    chosen, best = native.best(logits, 1, 3, top=5)

    assert chosen == pytest.approx(float(expected[3]), abs=1e-6)
    values, ids = expected.topk(5)
    assert [token for token, _ in best] == ids.tolist()
    assert [value for _, value in best] == pytest.approx(values.tolist(), abs=1e-6)


def test_of_equally_likely_tokens_the_first_are_the_best(native: NativeDraws) -> None:
    logits = torch.zeros(1, 3000)
    logits[0, [7, 1700, 2900]] = 1.0

    assert [token for token, _ in native.best(logits, 0, 0, top=5)[1]] == [7, 1700, 2900, 0, 1]
    assert native.tokens(logits, [Draw(0, 1, 0, 0, 0)]) == [7]
    assert native.tokens(logits, [Draw(1, 1, 0, 3, 0.5)]) == [1700]


def test_without_numbers_there_are_no_log_probabilities(native: NativeDraws) -> None:
    logits = logits_of(600)
    logits[0, 550] = torch.nan

    assert np.isnan(native.best(logits, 0, 1, top=0)[0])


@pytest.mark.parametrize(("vocab", "known"), [(5, 1), (64, 8), (4099, 513), (4099, 100), (129_280, 16_160)])
def test_only_tokens_whose_bit_is_set_are_left(native: NativeDraws, vocab: int, known: int) -> None:
    logits = logits_of(vocab)[0]
    allowed = np.random.default_rng(vocab).integers(0, 256, known, dtype=np.uint8)
    bits = np.zeros(vocab, dtype=bool)
    count = min(vocab, 8 * known)
    bits[:count] = np.unpackbits(allowed, count=count, bitorder="little")

    masked = native.masked(logits, allowed)

    assert torch.equal(masked, logits.masked_fill(~torch.from_numpy(bits), -torch.inf))
