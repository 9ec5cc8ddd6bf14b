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
from memory.checkpoint.reads import read_tensor
from quant.errors import CheckpointError
from quant.formats.gguf import weight_from_bytes
from quant.packed import PackedTensor

WEIGHT = np.arange(3 * 64, dtype=np.float32).reshape(3, 64)
NORM = np.linspace(0, 1, 64, dtype=np.float32)


def write(path: Path, *, architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "Ġé"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 1])
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


def write_parts(folder: Path, *, said: int = 2, tensors: int = 2) -> list[Path]:
    """A model in two parts, the second of which says that it is one of `said`."""
    paths = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama") if number == 0 else gguf.GGUFWriter(path, "")
        if number == 0:
            writer.add_uint32("llama.block_count", 3)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", said if number else 2)
        writer.add_int32("split.tensors.count", tensors)
        writer.add_tensor(f"blk.{number}.weight", WEIGHT + number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("named", [0, 1])
def test_a_model_in_parts_is_opened_by_any_of_them(tmp_path: Path, named: int) -> None:
    paths = write_parts(tmp_path)

    checkpoint = open_gguf(paths[named])

    assert checkpoint.config["llama.block_count"] == 3
    assert checkpoint.name == "m"
    assert [checkpoint.entries[f"blk.{n}.weight"].file for n in (0, 1)] == paths
    second = checkpoint.read("blk.1.weight").view(torch.float32).view(3, 64)
    assert torch.equal(second, torch.from_numpy(WEIGHT + 1))


def test_parts_that_are_missing_are_all_named(tmp_path: Path) -> None:
    (first, _) = write_parts(tmp_path)
    renamed = first.rename(tmp_path / "m-00002-of-00004.gguf")
    content = bytearray(renamed.read_bytes())
    at = content.index(b"split.count") + len(b"split.count") + 4
    content[at : at + 2] = (4).to_bytes(2, "little")
    renamed.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"3 are missing: m-00001-.*, m-00003-of-00004.gguf, m-00004-"):
        open_gguf(renamed)


def test_a_part_under_a_name_without_a_number_is_refused(tmp_path: Path) -> None:
    (first, _) = write_parts(tmp_path)

    with pytest.raises(CheckpointError, match=r"one of 2 parts, .*must end in -00001-of-00002\.gguf"):
        open_gguf(first.rename(tmp_path / "model.gguf"))


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"says that it is part 1 .* of 3, expected 1 of 2"):
        open_gguf(write_parts(tmp_path, said=3)[0])


def test_parts_without_all_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 tensors in its 2 parts, expected 5"):
        open_gguf(write_parts(tmp_path, tensors=5)[0])


def test_one_expert_of_a_fused_tensor_is_a_range_of_the_file(tmp_path: Path) -> None:
    experts = np.random.default_rng(0).normal(size=(4, 6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("ffn_gate_exps", gguf.quants.quantize(experts, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = open_gguf(tmp_path / "m.gguf").entries["ffn_gate_exps"]

    third = entry.of(2)
    half = third.rows(3, 6)

    assert (entry.shape, third.shape, half.shape) == ((4, 6, 64), (6, 64), (3, 64))
    whole = gguf.quants.dequantize(gguf.quants.quantize(experts, kind), kind)
    for part, expected in ((third, whole[2]), (half, whole[2, 3:])):
        weight = weight_from_bytes(part.dtype, part.shape, read_tensor(part))
        assert isinstance(weight, PackedTensor)
        np.testing.assert_array_equal(weight.decode().numpy(), expected)
    with pytest.raises(IndexError, match=r"ffn_gate_exps \[4, 6, 64\] has no rows 4\.\.5"):
        entry.of(4)
