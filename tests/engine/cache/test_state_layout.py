"""A state's bytes go to and from memory as they lie there, whatever their format means."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.cache.state_files import PIECE, State, StateFile, StateFileError, StateHeader, write_state
from engine.cache.state_layout import as_it_lies, copied, layout_of, target_in

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8]


def heads_of(dtype: torch.dtype, rows: int, fill: bool = True) -> torch.Tensor:
    """A slot `[rows, layers, heads, width]` of a cache that keeps the rows of each head together."""
    whole = torch.zeros(2, 3, 2, rows, 8 * dtype.itemsize, dtype=torch.uint8)  # [layers, slots, heads, ...]
    if fill:
        whole.copy_(torch.randint(0, 100, whole.shape, generator=torch.Generator().manual_seed(rows)))
    return whole.view(dtype)[:, 1].permute(2, 0, 1, 3)


def written(path: Path, rows: torch.Tensor) -> Path:
    header = StateHeader(np.arange(7, dtype=np.int32), 0, 7, "", False)
    write_state(path, State(header, (copied(rows),), (), None))
    return path


def read_back(path: Path, view: torch.Tensor, count: int, wanted: int) -> None:
    with StateFile(path) as file:
        target, beside = target_in(view, count, wanted)
        pieces = file.pieces("rows.0", target)
        random.Random(1).shuffle(pieces)
        for read in pieces:
            read()
        if beside is not None:
            as_it_lies(view[:wanted]).copy_(beside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_format_are_read_into_a_longer_cache_as_they_were(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = heads_of(dtype, 50)[:37]
    path = written(tmp_path / "a", saved)
    place = heads_of(dtype, 90, fill=False)

    read_back(path, place, 37, 37)

    assert torch.equal(place[:37].contiguous().view(torch.uint8), saved.contiguous().view(torch.uint8))
    assert not place[37:].contiguous().view(torch.uint8).any()


def test_of_a_longer_file_only_the_wanted_rows_are_taken(tmp_path: Path) -> None:
    rows = 3 * PIECE // (32 * 12)  # several pieces; each head's run begins within one
    saved = heads_of(torch.float32, rows)
    path = written(tmp_path / "a", saved)
    place = heads_of(torch.float32, rows, fill=False)

    read_back(path, place, rows, rows // 3)

    assert torch.equal(place[: rows // 3], saved[: rows // 3])
    assert not place[rows // 3 :].any()


def test_rows_that_do_not_lie_in_runs_are_read_all_the_same(tmp_path: Path) -> None:
    saved = torch.arange(240.0).view(20, 12)
    path = written(tmp_path / "a", saved)
    place = torch.zeros(20, 24)[:, ::2]

    read_back(path, place, 20, 20)

    assert torch.equal(place, saved)


def test_a_changed_byte_is_found_in_whatever_piece_it_is(tmp_path: Path) -> None:
    saved = torch.zeros(PIECE // 16, 8)
    path = written(tmp_path / "a", saved)
    content = bytearray(path.read_bytes())
    for place in (-PIECE - PIECE // 2, -PIECE // 2):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(StateFileError, match=r"rows\.0 is not what was written"):
            read_back(path, torch.zeros_like(saved), len(saved), len(saved))


def test_another_format_or_shape_is_another_layout() -> None:
    rows = heads_of(torch.float32, 50)
    assert layout_of(rows, 10) == layout_of(heads_of(torch.float32, 90), 10)
    assert layout_of(rows, 10) != layout_of(heads_of(torch.bfloat16, 50), 10)
    assert layout_of(rows, 10) != layout_of(rows.contiguous(), 10)
