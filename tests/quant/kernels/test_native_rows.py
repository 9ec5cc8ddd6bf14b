"""Encoded rows in native code: the bytes that plain torch makes, read as the values that they stand for."""

from __future__ import annotations

import pytest
import torch

from quant.formats.rows import EncodedRows, RowFormat, values_of
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.torch_layers import TorchLayers
from tests.quant.formats.test_rows import FORMATS, V4_ENTRY, V4_INDEX_KEY, V41_ENTRY, V41_WINDOW

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

TORCH = TorchLayers()
LEVELS = library.available_levels() if library.library_path() is not None else ()


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return NativeKernels(level=str(request.param))


def values(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hard_values(dim: int) -> torch.Tensor:
    """Rows of very different magnitudes, with ties, zeros and numbers near the limits of codes."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(400, dim, generator=generator).mul(4).exp()
    x = torch.randn(400, dim, generator=generator) * spread
    x[:100] = (x[:100] * 4).round().clamp(-60, 60) / 4
    x[100:120] *= 1e-30
    x[120:140] *= 1e30
    x[140, : dim // 2] = 0
    x[141] = 0
    return x


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_native_code_makes_the_same_bytes(kernels: NativeKernels, form: RowFormat) -> None:
    x = hard_values(form.dim)
    rows = kernels.encode_rows(x, form)
    assert isinstance(rows, EncodedRows)
    assert torch.equal(rows.codes, form.encode(x))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_attention_over_encoded_rows_is_that_over_their_values(
    kernels: NativeKernels, form: RowFormat
) -> None:
    tokens, held = 5, 150
    rows = TORCH.encode_rows(values(2, held, form.dim, seed=2), form)
    others = TORCH.encode_rows(values(2, held, form.dim, seed=3), form)
    q = values(tokens, 4, form.dim)
    found = kernels.attend(q, rows, others, window=140)
    assert torch.equal(found, kernels.attend(q, values_of(rows), values_of(others), window=140))
    assert torch.allclose(found, TORCH.attend(q, rows, others, window=140), atol=2e-5)


def test_values_may_be_the_first_columns_of_encoded_keys(kernels: NativeKernels) -> None:
    form = FORMATS["V3 latent"]
    rows = TORCH.encode_rows(values(1, 300, form.dim, seed=2), form)
    assert isinstance(rows, EncodedRows)
    first = EncodedRows(rows.codes, form, columns=512)
    q = values(3, 4, form.dim)
    expected = kernels.attend(q, values_of(rows), values_of(rows)[..., :512].contiguous())
    assert torch.equal(kernels.attend(q, rows, first), expected)
    chosen = torch.tensor([[0, 7, 200, -1]] * 3)
    expected = kernels.attend_chosen(q, values_of(rows)[0], chosen, 512)
    assert torch.equal(kernels.attend_chosen(q, rows[0], chosen, 512), expected)
    assert torch.allclose(TORCH.attend_chosen(q, rows[0], chosen, 512), expected, atol=2e-5)


@pytest.mark.parametrize(("window", "entry"), [(V41_WINDOW, V41_ENTRY), (V4_ENTRY, V4_ENTRY)])
def test_windows_and_entries_may_have_formats_of_their_own(
    kernels: NativeKernels, window: RowFormat, entry: RowFormat
) -> None:
    near = TORCH.encode_rows(values(9, 512, seed=2), window)
    far = TORCH.encode_rows(values(40, 512, seed=3), entry)
    chosen = torch.tensor([[3, 39, -1], [0, 1, 2], [5, -1, -1]])
    q, sink = values(3, 4, 512), values(4)
    found = kernels.attend_sparse(q, near, sink, 6, far, chosen)
    assert torch.equal(found, kernels.attend_sparse(q, values_of(near), sink, 6, values_of(far), chosen))
    assert torch.allclose(found, TORCH.attend_sparse(q, near, sink, 6, far, chosen), atol=2e-5)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_index_scores_over_encoded_keys(kernels: NativeKernels, form: RowFormat) -> None:
    keys = TORCH.encode_rows(values(200, form.dim, seed=2), form)
    queries, weights, visible = values(3, 5, form.dim), values(3, 5, seed=4), torch.tensor([1, 150, 200])
    found = kernels.index_scores(queries, weights, keys, visible)
    plain = kernels.index_scores(form.as_query(queries), weights, values_of(keys), visible)
    assert torch.equal(found, plain)
    assert torch.allclose(found, TORCH.index_scores(queries, weights, keys, visible), rtol=1e-4, atol=1e-3)
    named = torch.tensor([[5, 9, -1], [0, 1, 2], [199, -1, 7]])
    some = kernels.index_scores(queries, weights, keys, visible, named)
    assert torch.equal(some[1], found.new_tensor([found[1, 0], found[1, 1], found[1, 2]]))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("heads", [1, 8, 13, 32])
def test_index_scores_of_integers_are_the_same_at_every_level(heads: int, turned: bool) -> None:
    """Also where the scales of a row are so far apart that its integers cannot be added."""
    form = RowFormat(128, "e2m1", "ue8m0", 32, turned=turned)
    spread = values(3, 1, 4, 1, seed=9).mul(4).exp().expand(3, heads, 4, 32).reshape(3, heads, 128)
    queries, weights = values(3, heads, 128) * spread, values(3, heads, seed=4)
    rows = values(300, 128, seed=2)
    rows[100:] *= values(200, 4, 1, seed=8).mul(4).exp().expand(200, 4, 32).reshape(200, 128)
    keys, visible = TORCH.encode_rows(rows, form), torch.tensor([33, 290, 300])
    found = [NativeKernels(level=level).index_scores(queries, weights, keys, visible) for level in LEVELS]
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(
        found[0], TORCH.index_scores(queries, weights, keys, visible), rtol=1e-5, atol=1e-3
    )
    named = torch.tensor([[5, 9, -1], [0, 1, 150], [299, -1, 7]])
    for level in LEVELS:
        some = NativeKernels(level=level).index_scores(queries, weights, keys, visible, named)
        assert torch.equal(some[1], found[0][1, named[1]])
        assert torch.equal(some[2, ::2], found[0][2, [299, 7]])


@pytest.mark.parametrize("dim", [32, 64, 96, 160, 256])
def test_index_scores_of_many_tokens_are_those_of_each_alone(dim: int) -> None:
    """Keys are decoded once for many; rows have one to eight scales."""
    form = RowFormat(dim, "e2m1", "ue8m0", 32)
    tokens = 70
    queries, weights = values(tokens, 9, dim), values(tokens, 9, seed=4)
    keys, visible = TORCH.encode_rows(values(301, dim, seed=2), form), torch.arange(232, 232 + tokens)
    found = [NativeKernels(level=level).index_scores(queries, weights, keys, visible) for level in LEVELS]
    assert all(torch.equal(found[0], other) for other in found)
    judge = TORCH.index_scores(queries, weights, keys, visible)
    torch.testing.assert_close(found[0], judge, rtol=1e-5, atol=1e-3)
    for token in (0, 31, 32, 69):
        row = slice(token, token + 1)
        alone = NativeKernels().index_scores(queries[row], weights[row], keys, visible[row])
        assert torch.equal(alone, found[0][row])


def test_queries_are_rounded_like_keys_whose_scales_are_powers_of_two(kernels: NativeKernels) -> None:
    queries, weights, visible = values(1, 4, 128), values(1, 4, seed=4), torch.tensor([50])
    for name, is_rounded in (("V4 index key", True), ("V3.2 index key", True), ("fp8 head", False)):
        form = FORMATS[name]
        x = queries[..., : form.dim]
        keys = TORCH.encode_rows(values(50, form.dim, seed=2), form)
        assert form.rounds_queries == is_rounded
        again = form.decode(form.encode(x))
        once = kernels.index_scores(x, weights, keys, visible)
        turned = form.as_query(again) if not form.turned else again
        twice = kernels.index_scores(turned, weights, values_of(keys), visible)
        assert torch.equal(once, twice) == is_rounded


def test_scores_of_turned_keys_are_near_those_of_the_keys(kernels: NativeKernels) -> None:
    keys, queries, weights = values(50, 128, seed=2), values(1, 8, 128), values(1, 8, seed=4).abs()
    visible = torch.tensor([50])
    exact = kernels.index_scores(queries, weights, keys, visible)
    found = kernels.index_scores(queries, weights, kernels.encode_rows(keys, V4_INDEX_KEY), visible)
    assert (found - exact).norm() < 0.2 * exact.norm()
