"""Engram rows are the table's rows, wherever they come from; hot ones are read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from memory.checkpoint import Checkpoint
from memory.engram_store import EngramStore, HotRows, TableFiles
from memory.safetensors_files import open_safetensors
from memory.telemetry import Telemetry
from quant.fp8 import FP8_ROW
from quant.kernels.reference import ReferenceKernels
from quant.packed import PackedTensor

ROWS, DIM = 5003, 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tables")
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(ROWS, DIM, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.randint(110, 140, (ROWS, DIM // 32), generator=generator, dtype=torch.uint8)
    save_file(
        {"t.scale": scales.view(torch.float8_e8m0fnu), "pad": torch.zeros(1001), "t.weight": codes},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text('{"model_type": "test"}')
    return open_safetensors(folder)


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint) -> torch.Tensor:
    """The whole table as numbers."""
    codes = checkpoint.map("t.weight").view(ROWS, DIM)
    scales = checkpoint.map("t.scale").view(ROWS, DIM // 32)
    return PackedTensor(FP8_ROW, (ROWS, DIM), codes, scales).decode()


def make_store(checkpoint: Checkpoint, budget_bytes: int) -> EngramStore:
    files = TableFiles(checkpoint.entries["t.weight"], checkpoint.entries["t.scale"], FP8_ROW, DIM)
    return EngramStore({7: files}, checkpoint, ReferenceKernels(), budget_bytes, Telemetry())


@pytest.fixture(params=[0, 20_000, 10**6], ids=["no-cache", "hot-rows", "whole-table"])
def store(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[EngramStore]:
    store = make_store(checkpoint, request.param)
    yield store
    store.close()


def test_rows_are_the_tables_rows(store: EngramStore, table: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        rows = torch.randint(0, ROWS, (700,), generator=generator)
        assert torch.equal(store.lookup(7, rows).wait(), table[rows])
    edges = torch.tensor([0, ROWS - 1, 0])
    assert torch.equal(store.lookup(7, edges).wait(), table[edges])


def test_looking_up_nothing_gives_nothing(store: EngramStore) -> None:
    assert store.lookup(7, torch.tensor([], dtype=torch.int64)).wait().shape == (0, DIM)


def test_hot_rows_are_read_once(checkpoint: Checkpoint) -> None:
    telemetry = Telemetry()
    files = TableFiles(checkpoint.entries["t.weight"], checkpoint.entries["t.scale"], FP8_ROW, DIM)
    store = EngramStore({7: files}, checkpoint, ReferenceKernels(), 60_000, telemetry)
    rows = torch.arange(0, 200, 3).repeat(2)
    for _ in range(3):
        store.lookup(7, rows).wait()
    seen = telemetry.snapshot().rows
    assert seen["asked"] == 3 * 134
    assert seen["unique"] == 3 * 67
    assert seen["read"] == 67
    assert seen["cached"] == 2 * 67
    store.close()


def test_bytes_held_stay_within_the_budget(checkpoint: Checkpoint) -> None:
    for budget_bytes in (5_000, 50_000, 330_198):
        store = make_store(checkpoint, budget_bytes)
        assert store.nbytes <= budget_bytes
        store.close()


@given(
    lookups=st.lists(
        st.lists(st.integers(0, 200), min_size=1, max_size=20, unique=True), min_size=1, max_size=20
    )
)
def test_a_cached_row_is_never_another_rows_bytes(lookups: list[list[int]]) -> None:
    hot = HotRows(rows=16, row_bytes=4)
    for ids in lookups:
        rows = np.array(sorted(ids), dtype=np.int64)
        content = rows.astype("<i4").view(np.uint8).reshape(-1, 4)
        out = np.zeros((len(rows), 4), dtype=np.uint8)
        found = hot.find(rows, out)
        assert (out[found] == content[found]).all()
        if not found.all():
            hot.keep(rows[~found], content[~found])
