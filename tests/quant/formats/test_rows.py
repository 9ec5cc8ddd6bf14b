"""Rows of a cache: what their bytes mean, how far values move, and that moving them once is enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.formats.rows import EncodedRows, RowFormat, hadamard

V41_WINDOW = RowFormat(512, "e4m3", "ue8m0", 32)
V41_ENTRY = RowFormat(512, "e2m1", "e4m3", 16)
V41_INDEX_KEY = RowFormat(128, "e2m1", "ue8m0", 32)
V4_ENTRY = RowFormat(512, "e4m3", "ue8m0", 64, tail=64)
V4_INDEX_KEY = RowFormat(128, "e2m1", "ue8m0", 32, turned=True)
V3_LATENT = RowFormat(576, "e4m3", "float32", 128, tail=64)
V32_INDEX_KEY = RowFormat(128, "e4m3", "ue8m0", turned=True)
FORMATS = {
    "V4.1 window": V41_WINDOW, "V4.1 entry": V41_ENTRY, "V4.1 index key": V41_INDEX_KEY, "V4 entry": V4_ENTRY,
    "V4 index key": V4_INDEX_KEY, "V3 latent": V3_LATENT, "V3.2 index key": V32_INDEX_KEY,
    "int8 head": RowFormat(128, "int8", "float32"), "fp8 head": RowFormat(80, "e4m3", "float32"),
    "bf16": RowFormat(40, "bf16"), "cut": RowFormat(27, "e2m1", "e4m3", 16, tail=4),
    "cut int8": RowFormat(21, "int8", "float32", 16),
}  # fmt: skip


def some_rows(form: RowFormat, seed: int = 1, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(6, form.dim, generator=generator) * spread
    return torch.randn(6, form.dim, generator=generator) * sizes.exp()


def test_rows_take_as_many_bytes_as_the_vendors_say() -> None:
    assert V41_WINDOW.row_bytes == 528
    assert V41_ENTRY.row_bytes == 288
    assert V41_INDEX_KEY.row_bytes == V4_INDEX_KEY.row_bytes == 68
    assert V4_ENTRY.row_bytes == 584
    assert V3_LATENT.row_bytes == 656
    assert V32_INDEX_KEY.row_bytes == 132


CODED = {name: form for name, form in FORMATS.items() if form.code != "bf16"}


@pytest.mark.parametrize("form", CODED.values(), ids=CODED)
def test_a_value_moves_by_half_a_step_at_most(form: RowFormat) -> None:
    x = some_rows(form)
    if form.turned:
        x = hadamard(x)
        form = RowFormat(form.dim, form.code, form.scale, form.group, form.tail)
    found = form.decode(form.encode(x))
    # half a step, relative to a value or to the largest of its group; a rounded e4m3 scale clips 1/16 more
    relative = {"e4m3": 2**-4, "e2m1": 2**-2, "int8": 0}[form.code]
    of_largest = {"e4m3": 2**-16, "e2m1": 1 / 12, "int8": 1 / 253}[form.code]
    if form.scale == "e4m3":
        relative += 2**-3
    elif form.scale == "ue8m0" and form.code == "e2m1":
        of_largest *= 2
    groups = torch.arange(form.coded) // form.group
    largest = torch.stack([x[:, : form.coded][:, groups == g].abs().amax(1) for g in range(form.groups)], 1)
    coded = slice(form.coded)
    bound = relative * x[:, coded].abs() + of_largest * largest[:, groups]
    assert bool(((found - x)[:, coded].abs() <= bound).all())
    assert torch.equal(found[:, form.coded :], x[:, form.coded :].bfloat16().float())


@pytest.mark.parametrize("form", [f for f in FORMATS.values() if not f.turned], ids=str)
def test_what_was_rounded_once_is_kept_as_it_is(form: RowFormat) -> None:
    once = form.decode(form.encode(some_rows(form)))
    assert torch.equal(form.decode(form.encode(once)), once)


def test_fp4_with_e4m3_scales_is_what_the_format_says() -> None:
    form = RowFormat(16, "e2m1", "e4m3", 16)
    x = torch.tensor([[12.0, -12.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.49, -1.0, 0, 5.0, 7.0, 10.0, -0.1]])
    row = form.encode(x)[0]
    assert row[8:].tolist() == [0x40, 0, 0, 0]  # scale 2, and filled up
    assert row[:8].tolist() == [0xF7, 0x56, 0x34, 0x12, 0x00, 0x09, 0x64, 0x06]
    expected = [12, -12, 8, 6, 4, 3, 2, 1, 0, 0, -1, 0, 4, 8, 8, 0]
    assert form.decode(row).tolist() == [float(value) for value in expected]


def test_a_power_of_two_is_the_smallest_that_clips_nothing() -> None:
    form = RowFormat(4, "e4m3", "ue8m0", 2)
    row = form.encode(torch.tensor([[448.0, 1.0, 448.5, 1.0]]))[0]
    assert row[4:6].tolist() == [127, 128]


def test_zeros_stay_zeros() -> None:
    for form in FORMATS.values():
        assert not form.decode(form.encode(torch.zeros(1, form.dim))).any()


@given(seed=st.integers(0, 1000))
def test_a_hadamard_matrix_keeps_products_and_is_its_own_inverse(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 128, generator=generator)
    assert torch.allclose(hadamard(hadamard(a)), a, atol=1e-5)
    assert torch.allclose(hadamard(a) @ hadamard(b), a @ b, atol=1e-4)


def test_turning_spares_outliers() -> None:
    x = some_rows(V4_INDEX_KEY)
    x[:, 5] = 100.0
    plain = V41_INDEX_KEY.decode(V41_INDEX_KEY.encode(x))
    turned = hadamard(V4_INDEX_KEY.decode(V4_INDEX_KEY.encode(x)))
    others = torch.arange(128) // 32 == 0
    others[5] = False
    lost = (x.abs() < 100 / 16)[:, others]  # half of the smallest code beside such a value is more
    assert not plain[:, others][lost].any()
    assert (turned - x).norm() < 0.2 * x.norm()


def test_rows_are_indexed_like_their_values() -> None:
    rows = EncodedRows(V4_ENTRY.encode(some_rows(V4_ENTRY)), V4_ENTRY)
    assert rows.shape == (6, 512)
    assert torch.equal(rows[2:4].decode(), rows.decode()[2:4])
    first = EncodedRows(rows.codes, V4_ENTRY, columns=448)
    assert torch.equal(first.decode(), rows.decode()[:, :448])
