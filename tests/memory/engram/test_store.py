"""Engram rows are the table's rows, wherever they come from; hot ones are read once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.safetensors_files import open_safetensors
from memory.engram.store import EngramStore, TableFiles
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.errors import CheckpointError
from quant.formats.fp8 import FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu.library import LibraryMissingError
from quant.kernels.reference import ReferenceKernels
from quant.packed import PackedTensor

ROWS, DIM = 5003, 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tables")
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(ROWS, DIM, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.randint(110, 140, (ROWS, DIM // 32), generator=generator, dtype=torch.uint8)
    return write(folder, codes, scales)


def write(folder: Path, codes: torch.Tensor, scales: torch.Tensor) -> Checkpoint:
    save_file(
        {"t.scale": scales.view(torch.float8_e8m0fnu), "pad": torch.zeros(1001), "t.weight": codes},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text('{"model_type": "test"}')
    return open_safetensors(folder)


def table_files(checkpoint: Checkpoint) -> TableFiles:
    return TableFiles(checkpoint.entries["t.weight"], checkpoint.entries["t.scale"], FP8_ROW, DIM)


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint) -> torch.Tensor:
    """The whole table as numbers."""
    codes = checkpoint.read("t.weight").view(ROWS, DIM)
    scales = checkpoint.read("t.scale").view(ROWS, DIM // 32)
    return PackedTensor(FP8_ROW, (ROWS, DIM), codes, scales).decode()


def make_store(checkpoint: Checkpoint, budget_bytes: int) -> EngramStore:
    files = table_files(checkpoint)
    return EngramStore(
        {7: files}, checkpoint, ReferenceKernels(), {7: files.share(budget_bytes)}, Telemetry()
    )


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
    files = table_files(checkpoint)
    store = EngramStore({7: files}, checkpoint, ReferenceKernels(), {7: files.share(60_000)}, telemetry)
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


@pytest.mark.parametrize("budget_bytes", [0, 3_000, 30_000])
def test_repeated_look_ups_under_any_cache_give_the_tables_rows(
    checkpoint: Checkpoint, table: torch.Tensor, budget_bytes: int
) -> None:
    store = make_store(checkpoint, budget_bytes)
    generator = torch.Generator().manual_seed(5)
    pending = []
    for _ in range(60):  # many at once, on few rows: they share sets of the cache
        rows = torch.randint(0, 400, (37,), generator=generator) * 11 % ROWS
        pending.append((rows, store.lookup(7, rows)))
    for rows, ticket in pending:
        assert torch.equal(ticket.wait(), table[rows])
    store.close()


def test_scales_are_held_where_they_take_at_most_half_of_the_share(checkpoint: Checkpoint) -> None:
    reads = []
    for budget_bytes in (2 * ROWS * DIM // 32 - 1, 2 * ROWS * DIM // 32):
        telemetry = Telemetry()
        files = table_files(checkpoint)
        share = files.share(budget_bytes)
        store = EngramStore({7: files}, checkpoint, ReferenceKernels(), {7: share}, telemetry)
        store.lookup(7, torch.tensor([1000])).wait()
        reads.append(telemetry.snapshot().moved_bytes["engram"])
        store.close()
    assert reads == [8192, 4096]


def test_rows_of_other_formats_are_the_tables_rows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(0, 256, (900, DIM // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (900, DIM // 32), generator=generator, dtype=torch.uint8)
    checkpoint = write(tmp_path, codes.view(torch.int8), scales)
    files = TableFiles(checkpoint.entries["t.weight"], checkpoint.entries["t.scale"], MXFP4, DIM)
    rows = torch.randint(0, 900, (200,), generator=generator)
    expected = PackedTensor(MXFP4, (900, DIM), codes, scales).decode()[rows]
    for budget_bytes in (0, 10_000, 10**6):
        share = files.share(budget_bytes)
        store = EngramStore({7: files}, checkpoint, ReferenceKernels(), {7: share}, Telemetry())
        assert torch.equal(store.lookup(7, rows).wait(), expected)
        store.close()


def on_a_gpu(checkpoint: Checkpoint, telemetry: Telemetry) -> EngramStore:
    """A store whose layer is computed on a virtual GPU."""
    gpus = {7: Tier("vram:0", 1 << 20, torch.device("cpu"))}
    files = table_files(checkpoint)
    return EngramStore(
        {7: files}, checkpoint, ReferenceKernels(), {7: files.share(20_000)}, telemetry, gpus=gpus
    )


def test_rows_of_a_layer_on_a_gpu_are_sent_there(checkpoint: Checkpoint, table: torch.Tensor) -> None:
    telemetry = Telemetry()
    store = on_a_gpu(checkpoint, telemetry)
    generator = torch.Generator().manual_seed(8)
    asked = [torch.randint(0, ROWS, (n,), generator=generator) for n in (1, 300, 24, 1, 24)]
    sent = [store.lookup(7, rows) for rows in asked]
    for rows, ticket in reversed(list(zip(asked, sent, strict=True))):
        assert torch.equal(ticket.wait(), table[rows])
    seen = telemetry.snapshot()
    assert seen.moved_bytes["engram to vram:0"] == 350 * DIM * 4
    assert seen.rows["asked"] == 350
    assert "engram demand" not in seen.stalled_s  # compute waits for the GPU's link alone
    store.close()


def test_a_look_up_that_fails_on_its_way_to_a_gpu_fails_alone(
    checkpoint: Checkpoint, table: torch.Tensor
) -> None:
    store = on_a_gpu(checkpoint, Telemetry())
    fails, follows = store.lookup(7, torch.tensor([ROWS])), store.lookup(7, torch.tensor([2]))
    with pytest.raises(IndexError):
        fails.wait()
    assert torch.equal(follows.wait(), table[[2]])
    store.close()


def test_without_compiled_kernels_rows_are_the_same(
    checkpoint: Checkpoint, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(threads: int) -> None:
        raise LibraryMissingError("not built")

    monkeypatch.setattr("memory.engram.store.RowServer", missing)
    store = make_store(checkpoint, 0)
    rows = torch.tensor([5, 0, ROWS - 1, 5])
    assert torch.equal(store.lookup(7, rows).wait(), table[rows])
    store.close()


def test_a_row_beyond_the_table_is_refused_and_the_store_lives(
    store: EngramStore, table: torch.Tensor
) -> None:
    for beyond in (-1, ROWS):
        with pytest.raises(IndexError):
            store.lookup(7, torch.tensor([3, beyond])).wait()
    assert torch.equal(store.lookup(7, torch.tensor([3])).wait(), table[[3]])


def test_a_file_that_ends_too_early_fails_the_look_up_that_needs_it_and_no_other(tmp_path: Path) -> None:
    codes = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.full((ROWS, DIM // 32), 127, dtype=torch.uint8)
    checkpoint = write(tmp_path, codes, scales)
    telemetry = Telemetry()
    files = table_files(checkpoint)
    share = files.share(3 * scales.nbytes)
    store = EngramStore({7: files}, checkpoint, ReferenceKernels(), {7: share}, telemetry)
    entry = checkpoint.entries["t.weight"]
    os.truncate(entry.file, entry.offset + entry.nbytes - 20_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file has been truncated"):
        store.lookup(7, torch.tensor([0, ROWS - 1])).wait()
    assert torch.equal(store.lookup(7, torch.tensor([0])).wait(), codes[:1].float())
    assert telemetry.snapshot().failed == {"engram demand": 1}
    store.close()


def test_a_ticket_nobody_waits_for_and_a_closed_store_do_no_harm(checkpoint: Checkpoint) -> None:
    store = make_store(checkpoint, 0)
    tickets = [store.lookup(7, torch.arange(0, ROWS, 7)) for _ in range(40)]
    del tickets[::2]
    store.close()
    outcomes = set()
    for ticket in tickets:
        try:
            ticket.wait()
            outcomes.add("found")
        except RuntimeError as error:
            outcomes.add(str(error))
    assert outcomes <= {"found", "the Engram row store was closed"}
    with pytest.raises(RuntimeError, match="closed"):
        store.lookup(7, torch.tensor([0]))
