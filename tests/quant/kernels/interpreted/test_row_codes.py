"""Encoded rows of a cache in Triton's interpreter: the bytes that plain torch makes, and their values."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_triton.py", allow_module_level=True)

from quant.errors import FormatError
from quant.formats.rows import EncodedRows, RowFormat, values_of
from quant.kernels.cuda.attention import SparseAttention, splits_of
from quant.kernels.cuda.launch import Launcher
from quant.kernels.cuda.row_codes import check_has_kernels, encode_launch
from quant.kernels.cuda.selection import Choice
from quant.kernels.torch_layers import TorchLayers
from tests.quant.formats.test_rows import FORMATS
from tests.quant.kernels.test_native_rows import hard_values, values

TORCH = TorchLayers()
SLOTS, PLACES, MAX_ROWS = 3, 5, 4


def has_kernels(form: RowFormat) -> bool:
    try:
        check_has_kernels(form)
    except FormatError:
        return False
    return True


WITH_KERNELS = {name: form for name, form in FORMATS.items() if has_kernels(form)}


def step_of(slots: list[int], positions: list[int]) -> torch.Tensor:
    rest = [0] * (MAX_ROWS - len(slots))
    return torch.tensor([len(slots), *slots, *rest, *positions, *rest])


def test_most_formats_have_kernels() -> None:
    assert {"V4.1 window", "V4.1 entry", "V4.1 index key", "V4 entry", "V3 latent", "bf16"} <= set(
        WITH_KERNELS
    )
    assert "V4 index key" not in WITH_KERNELS


@pytest.mark.parametrize("form", WITH_KERNELS.values(), ids=WITH_KERNELS)
@pytest.mark.parametrize("ratio", [None, 2])
def test_rows_are_stored_as_torch_encodes_them(form: RowFormat, ratio: int | None) -> None:
    state = EncodedRows(torch.zeros(SLOTS, PLACES, form.row_bytes, dtype=torch.uint8), form)
    rows = hard_values(form.dim)[[3, 130, 141, 250]]
    step = step_of([2, 0, 1], [7, 3, 4])  # the fourth row is not alive
    Launcher().start(encode_launch(rows, state, step, 4, MAX_ROWS, ratio))
    expected = torch.zeros_like(state.codes)
    places = [(2, 7 % PLACES, 0), (0, 3, 1), (1, 4, 2)] if ratio is None else [(2, 3, 0), (0, 1, 1)]
    for slot, place, row in places:
        expected[slot, place] = form.encode(rows[row])
    assert torch.equal(state.codes, expected)


@pytest.mark.parametrize(
    ("window", "entry"), [("V4.1 window", "V4.1 entry"), ("V4 entry", "bf16"), ("int8 head", "fp8 head")]
)
def test_attention_reads_what_rows_stand_for(window: str, entry: str) -> None:
    first, second = FORMATS[window], FORMATS[entry]
    dim = 64
    first = RowFormat(dim, first.code, first.scale, min(first.group, 32), min(first.tail, 16))
    second = RowFormat(dim, second.code, second.scale, min(second.group, 16), min(second.tail, 16))
    rings = TORCH.encode_rows(values(SLOTS, 40, dim, seed=1), first)
    entries = TORCH.encode_rows(values(SLOTS, 30, dim, seed=2), second)
    heads, rows, seen = 4, 3, 24
    q, sink = values(rows, heads * dim, seed=3), values(heads, seed=4)
    chosen = torch.tensor([[0, 5, -1], [29, -1, -1], [1, 2, 3]])
    step = step_of([1, 2, 0], [50, 10, 39])

    def found(rings_: object, entries_: object) -> torch.Tensor:
        splits, out = splits_of(seen, 3), torch.zeros(rows, heads * dim)
        attention = SparseAttention(
            q, rings_, sink, seen, entries_, chosen, None, None,  # type: ignore[arg-type]
            torch.zeros(rows, splits * heads * dim), torch.zeros(rows, splits * heads * 2), out,
        )  # fmt: skip
        for launch in attention.launches(step, rows, MAX_ROWS):
            Launcher().start(launch)
        return out

    assert torch.equal(found(rings, entries), found(values_of(rings), values_of(entries)))


@pytest.mark.parametrize("form", WITH_KERNELS.values(), ids=WITH_KERNELS)
def test_index_scores_read_what_keys_stand_for(form: RowFormat) -> None:
    keys = TORCH.encode_rows(values(SLOTS, 70, form.dim, seed=2), form)
    heads, rows, k = 4, 2, 8
    queries, weights = values(rows, heads * form.dim, seed=3), values(rows, heads, seed=4)
    step = step_of([1, 2], [69, 33])

    rounded = form.as_query(queries.view(rows, heads, form.dim)).view(rows, -1)

    def scores(keys_: object, queries_: torch.Tensor) -> torch.Tensor:
        out = torch.full((rows, 70), -torch.inf)
        choice = Choice(
            queries_, None, weights, 0.5, keys_, 1, 0, 0, None,  # type: ignore[arg-type]
            torch.zeros(rows, k, dtype=torch.int64), out, None, None, None, None,
        )  # fmt: skip
        for launch in choice.launches(step, rows, MAX_ROWS):
            Launcher().start(launch)
        return out

    # The interpreter leaves products to numpy, which adds up in an order that depends on where values lie.
    torch.testing.assert_close(scores(keys, queries), scores(values_of(keys), rounded), rtol=1e-5, atol=1e-5)
