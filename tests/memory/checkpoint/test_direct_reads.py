"""Direct reads give exactly the bytes of the file, in few requests."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.checkpoint.direct_reads import BLOCK, DirectFiles, coalesce
from memory.checkpoint.entries import TensorEntry
from memory.transfer import CancelledError
from quant.errors import CheckpointError

CONTENT = np.random.default_rng(5).integers(0, 256, 300_001, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("disk") / "shard"
    file.write_bytes(CONTENT)
    return file


def entry(file: Path, name: str, start: int, stop: int) -> TensorEntry:
    return TensorEntry(name, "U8", (stop - start,), file, start, stop - start)


@given(
    spans=st.lists(
        st.tuples(st.integers(0, 300_000), st.integers(1, 60_000)), min_size=1, max_size=6, unique=True
    )
)
def test_ranges_hold_exactly_the_bytes_of_their_tensors(file: Path, spans: list[tuple[int, int]]) -> None:
    entries = [
        entry(file, str(i), start, min(start + size, len(CONTENT))) for i, (start, size) in enumerate(spans)
    ]
    direct = DirectFiles()
    direct.open([file])
    ranges = coalesce(entries)
    assert all(part.start % BLOCK == 0 for part in ranges)
    wanted = {e.name: CONTENT[e.offset : e.offset + e.nbytes] for e in entries}
    for stop in (None, threading.Event()):
        with patch("memory.checkpoint.direct_reads.PIECE", 2 * BLOCK):
            found = {name: raw.numpy().tobytes() for name, raw in direct.read(ranges, stop).items()}
        assert found == wanted
    direct.close()


def test_a_read_that_is_to_stop_ends_within_a_piece(file: Path) -> None:
    stop, pieces = threading.Event(), []

    def read_and_stop(descriptor: int, view: memoryview, at: int, needed: int, file: Path) -> None:
        pieces.append(needed)
        stop.set()

    direct = DirectFiles()
    direct.open([file])
    with (
        patch("memory.checkpoint.direct_reads.PIECE", BLOCK),
        patch("memory.checkpoint.direct_reads.read_into", read_and_stop),
        pytest.raises(CancelledError, match="no longer needed") as stopped,
    ):
        direct.read(coalesce([entry(file, "a", 0, 100_000)]), stop)
    direct.close()
    assert pieces == [BLOCK]
    assert stopped.value.moved_bytes == BLOCK


def test_tensors_that_lie_together_are_one_request(file: Path) -> None:
    entries = [entry(file, "b", 70_000, 140_000), entry(file, "a", 100, 70_000)]
    assert len(coalesce(entries)) == 1


def test_tensors_in_different_files_are_not(file: Path, tmp_path: Path) -> None:
    assert len(coalesce([entry(file, "a", 0, 10), entry(tmp_path / "other", "b", 0, 10)])) == 2


@given(start=st.integers(0, len(CONTENT) - 1), size=st.integers(1, 9000))
def test_a_tensor_in_memory_of_its_own_has_the_bytes_of_the_file(file: Path, start: int, size: int) -> None:
    size = min(size, len(CONTENT) - start)
    direct = DirectFiles()
    direct.open([file])
    content = direct.load(entry(file, "a", start, start + size))
    direct.close()
    assert content.numpy().tobytes() == CONTENT[start : start + size]


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(CONTENT[:5000])
    direct = DirectFiles()
    direct.open([file])
    with pytest.raises(CheckpointError, match="shard: ends at byte 5000"):
        direct.read(coalesce([entry(file, "a", 0, 9000)]))
    direct.close()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: cannot be opened"):
        DirectFiles().open([tmp_path / "nothing"])
