"""Opening GGUF files: what is found, and how bad files are told apart from good ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.checkpoint.gguf_files import is_gguf, open_gguf
from quant.errors import CheckpointError

WEIGHT = np.arange(3 * 64, dtype=np.float32).reshape(3, 64)
NORM = np.linspace(0, 1, 64, dtype=np.float32)


def write(path: Path, *, architecture: str = "llama", parts: int = 1) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "Ġé"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 1])
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_tensor(
        "token_embd.weight", gguf.quants.quantize(WEIGHT, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )  # fmt: skip
    writer.add_tensor("output_norm.weight", NORM)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("good") / "m.gguf").read_bytes()


def test_metadata_is_the_config_and_architecture_the_model_type(file: Path) -> None:
    checkpoint = open_gguf(file)

    assert checkpoint.model_type == "llama"
    assert checkpoint.config["llama.block_count"] == 3
    assert checkpoint.config["tokenizer.ggml.tokens"] == ["a", "", "Ġé"]
    assert checkpoint.config["tokenizer.ggml.token_type"] == [1, 3, 1]
    assert checkpoint.problems == []


def test_entries_name_type_shape_and_the_bytes_in_the_file(file: Path) -> None:
    checkpoint = open_gguf(file)

    entry = checkpoint.entries["token_embd.weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("Q8_0", (3, 64), 3 * 2 * 34)
    raw = checkpoint.read("token_embd.weight").numpy().reshape(3, -1)
    np.testing.assert_allclose(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0), WEIGHT, atol=0.8)
    assert torch.equal(checkpoint.read("output_norm.weight").view(torch.float32), torch.from_numpy(NORM))


def test_only_files_with_the_magic_letters_are_gguf(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"GGML....")

    assert is_gguf(file)
    assert not is_gguf(tmp_path / "other")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "nowhere")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_reported_as_a_bad_checkpoint(
    data: st.DataObject, good_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(good_bytes[: data.draw(st.integers(0, len(good_bytes) - 65))])  # padded to 32 bytes

    with pytest.raises(CheckpointError, match=r"cut\.gguf: (truncated|not a GGUF file)"):
        open_gguf(path)


def test_a_truncated_file_says_how_long_it_is_and_should_be(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])

    with pytest.raises(CheckpointError, match=rf"{len(whole) - 100} bytes, expected at least {len(whole)}"):
        open_gguf(file)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_cause_another_error(
    data: st.DataObject, good_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(good_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.sampled_from([0, 1, 9, 127, 255]))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)

    try:
        opened = open_gguf(path)
    except CheckpointError:
        return
    assert all(entry.offset + entry.nbytes <= len(damaged) for entry in opened.entries.values())


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(60), b"\x00" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_gguf(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf: no such file"):
        open_gguf(tmp_path / "none.gguf")


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="one of 4 parts; merge them"):
        open_gguf(write(tmp_path / "m.gguf", parts=4))
