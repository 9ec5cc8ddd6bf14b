"""A damaged checkpoint is refused before anything large is read, with everything that is wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.families.loader import load, open_checkpoint
from memory.checkpoint.safetensors_files import open_safetensors
from memory.engram.traces import FILE_NAME as ENGRAM_NAME
from memory.experts.traces import FILE_NAME as ROUTING_NAME
from quant.errors import CheckpointError, ConfigError, LociError


def refusal(path: Path) -> str:
    with pytest.raises(LociError) as caught:
        load(path)
    return str(caught.value)


def shard_of(path: Path, tensor: str) -> Path:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return path / str(index["weight_map"][tensor])


def rewrite(shard: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Write `shard` again with tensors replaced, added, or (None) left out."""
    tensors = {**load_file(shard), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, shard)


def test_tensors_are_found_without_reading_them(checkpoint_copy: Path) -> None:
    checkpoint = open_safetensors(checkpoint_copy)
    expected: dict[str, torch.Tensor] = {}
    for shard in checkpoint_copy.glob("model-*.safetensors"):
        expected |= load_file(shard)
    assert checkpoint.entries.keys() == expected.keys()
    name = "layers.0.attn.wq_a.weight"
    raw = checkpoint.read(name).view(torch.float8_e4m3fn).view(checkpoint.entries[name].shape)
    assert torch.equal(raw.float(), expected[name].float())


def test_everything_wrong_is_reported_at_once(checkpoint_copy: Path) -> None:
    shard = shard_of(checkpoint_copy, "norm.weight")
    rewrite(
        shard,
        {
            "norm.weight": torch.ones(5, dtype=torch.bfloat16),
            "embed.weight": None,
            "layers.0.attn_norm.weight": torch.ones(128, dtype=torch.int32),
            "surprise": torch.ones(3),
        },
    )
    message = refusal(checkpoint_copy)
    assert "norm.weight: shape [5], expected [128]" in message
    assert "missing tensor embed.weight [1024, 128]" in message
    assert "layers.0.attn_norm.weight: dtype I32, expected BF16 or F32 or F16" in message
    assert "unexpected tensor surprise [3]" in message
    assert (
        "embed.weight should be in model-00001-of-00002.safetensors, whose header does not have it" in message
    )
    assert "surprise is not in model.safetensors.index.json" in message


def test_a_missing_shard_is_named(checkpoint_copy: Path) -> None:
    shard = shard_of(checkpoint_copy, "norm.weight")
    shard.unlink()
    assert f"missing shard {shard.name}" in refusal(checkpoint_copy)


def test_a_truncated_shard_is_named_with_its_sizes(checkpoint_copy: Path) -> None:
    shard = shard_of(checkpoint_copy, "norm.weight")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1000])
    assert f"{shard.name}: truncated, {len(content) - 1000} bytes of {len(content)}" in refusal(
        checkpoint_copy
    )


@pytest.mark.parametrize(
    "content", [b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 9) + b"{not json"]
)
def test_a_shard_that_is_no_safetensors_file_is_named(checkpoint_copy: Path, content: bytes) -> None:
    shard = shard_of(checkpoint_copy, "norm.weight")
    shard.write_bytes(content)
    assert shard.name in refusal(checkpoint_copy)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "F32"},
        7,
    ],
)
def test_a_malformed_header_entry_is_named(checkpoint_copy: Path, entry: object) -> None:
    header = json.dumps({"odd": entry}).encode()
    shard = shard_of(checkpoint_copy, "norm.weight")
    shard.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "header entry 'odd' is malformed" in refusal(checkpoint_copy)


def test_an_index_that_points_elsewhere_is_reported(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["norm.weight"] = "model-00002-of-00002.safetensors"
    file.write_text(json.dumps(index))
    assert "norm.weight should be in model-00002-of-00002.safetensors" in refusal(checkpoint_copy)


def test_an_index_cannot_reach_outside_its_directory(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["norm.weight"] = "../../etc/passwd"
    file.write_text(json.dumps(index))
    assert "'../../etc/passwd', which is not a file next to the index" in refusal(checkpoint_copy)


def test_tensors_of_parts_that_are_not_used_are_ignored(checkpoint_copy: Path) -> None:
    extra = {"mtp.0.norm.weight": torch.ones(3), "vision.patch.weight": torch.ones(2, 2)}
    save_file(extra, checkpoint_copy / "extra.safetensors")
    file = checkpoint_copy / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    file.write_text(json.dumps(index))
    assert load(checkpoint_copy).model.info.family == "deepseek_v41"


def renamed(path: Path, *names: str) -> Path:
    """The checkpoint at `path` without its index, its two shards (or, for one name, its whole) so called."""
    shards = sorted(path.glob("model-*.safetensors"))
    tensors = [load_file(shard) for shard in shards]
    for file in (*path.glob("*.safetensors"), path / "model.safetensors.index.json"):
        file.unlink()
    parts = tensors if len(names) > 1 else [tensors[0] | tensors[1]]
    for name, part in zip(names, parts, strict=True):
        save_file(part, path / name)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors",),
        ("weights.safetensors",),
        ("consolidated.safetensors",),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("v4-1-of-2.safetensors", "v4-2-of-2.safetensors"),
    ],
)
def test_files_beside_the_models_own_do_not_matter(checkpoint_copy: Path, names: tuple[str, ...]) -> None:
    expected = open_safetensors(checkpoint_copy).entries.keys()
    path = renamed(checkpoint_copy, *names)
    others = ["adapter_model.safetensors", ROUTING_NAME, ENGRAM_NAME, ".x.safetensors", "y.safetensors.bak"]
    if "consolidated.safetensors" not in names:
        others.append("consolidated.safetensors")
    if names != ("weights.safetensors",) and "consolidated.safetensors" not in names:
        others.append("best.safetensors")
    for name in others:
        save_file({"other": torch.ones(1)}, path / name)

    checkpoint = open_safetensors(path)

    assert checkpoint.entries.keys() == expected
    assert checkpoint.problems == []


def test_several_files_that_could_be_the_model_are_named(checkpoint_copy: Path) -> None:
    path = renamed(checkpoint_copy, "weights.safetensors")
    save_file({"other": torch.ones(1)}, path / "weights-old.safetensors")

    assert (
        "any of weights-old.safetensors, weights.safetensors could be the model; rename the right one to "
        "model.safetensors or move the others away"
    ) in refusal(path)


def test_a_number_that_is_missing_among_shards_without_index_is_named(checkpoint_copy: Path) -> None:
    path = renamed(checkpoint_copy, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")

    assert "missing shard model-00002-of-00003.safetensors" in refusal(path)


def test_records_alone_are_no_model(checkpoint_copy: Path) -> None:
    renamed(checkpoint_copy, ROUTING_NAME)

    assert "nor a .safetensors file of a model" in refusal(checkpoint_copy)


def test_a_shard_that_is_a_directory_is_named(checkpoint_copy: Path) -> None:
    shard = shard_of(checkpoint_copy, "norm.weight")
    shard.unlink()
    shard.mkdir()

    assert f"{shard.name}: cannot be read" in refusal(checkpoint_copy)


def test_a_directory_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        open_checkpoint(tmp_path)


def test_a_path_that_is_not_there_says_what_a_model_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "nothing")


def test_an_unknown_model_type_is_named(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "config.json").write_text('{"model_type": "gpt9"}')
    with pytest.raises(ConfigError, match=r"'gpt9' is not supported; known: .*deepseek_v41,"):
        load(checkpoint_copy)


def test_a_broken_config_is_named(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "config.json").write_text("{")
    assert "not valid JSON" in refusal(checkpoint_copy)


def test_a_foreign_tokenizer_is_refused(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    renamed = {("Q" + str(i) if i > 1000 else token): i for token, i in vocabulary.items()}
    tokenizer["model"]["vocab"] = renamed
    tokenizer["model"]["merges"] = []
    file.write_text(json.dumps(tokenizer))
    assert "this tokenizer does not match the checkpoint" in refusal(checkpoint_copy)


def test_tables_that_the_hash_does_not_fit_are_refused(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["engram_num_embeddings"] = [4710]
    file.write_text(json.dumps(config))
    message = refusal(checkpoint_copy)
    assert "4710" in message
    assert "4708" in message
