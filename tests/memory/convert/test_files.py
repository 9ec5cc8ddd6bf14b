"""Converting whole checkpoints: what is written, what survives a kill, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.safetensors_files import open_safetensors
from memory.convert.files import convert_checkpoint
from memory.convert.plan import Choices
from quant.errors import BudgetError, CheckpointError, ConfigError, FormatError
from quant.formats.four_bit import FourBit
from quant.formats.fp8 import FP8_32, FP8_ROW
from quant.formats.int4 import INT4_32, INT4_OFFSET_64
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.formats.quantization_config import QuantizationConfig, Role
from quant.formats.stored import format_of, unpack
from quant.packed import PackedTensor

GOLDEN = Path("tests/golden/v41-c")
EXPERT = "layers.3.ffn.experts.5.w2"
EVERYTHING = Choices(INT4_32, torch.bfloat16, MXFP4)


def convert(source: Path, destination: Path, choices: Choices, **more: Any) -> Any:
    return convert_checkpoint(source, destination, choices, lambda done, total: None, **more)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") if file.name.startswith("model")
            for name, tensor in load_file(file).items()}  # fmt: skip


def weight_of(path: Path | Checkpoint, name: str, role: Role, shape: tuple[int, int]) -> PackedTensor:
    """A packed weight, read by the documented rule."""
    checkpoint = path if isinstance(path, Checkpoint) else open_safetensors(path)
    entries = [checkpoint.entries[f"{name}.{part}"] for part in ("weight", "scale")]
    config = QuantizationConfig.parse(checkpoint.config)
    format_ = format_of(role, entries[0].dtype, entries[1].dtype, config)
    assert format_ is not None
    raw = [checkpoint.read(entry.name) for entry in entries]
    return unpack(format_, shape, raw[0], raw[1], entries[1].dtype)


@pytest.mark.parametrize("format_", [NF4, INT4_32, INT4_OFFSET_64], ids=lambda f: f.name)
def test_experts_get_another_format_and_all_else_stays(format_: FourBit, tmp_path: Path) -> None:
    errors = convert(GOLDEN, tmp_path / "out", Choices(experts=format_))
    before, after = tensors_of(GOLDEN), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        if ".ffn.experts." not in name:
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    source = weight_of(GOLDEN, EXPERT, Role.EXPERT, (128, 64)).decode()
    converted = weight_of(tmp_path / "out", EXPERT, Role.EXPERT, (128, 64))
    assert converted.format is format_
    relative = ((converted.decode() - source).norm() / source.norm()).item()
    assert relative < 0.1
    reported = next(error for error in errors if error.name == f"{EXPERT}.weight")
    assert reported.relative_error == pytest.approx(relative, rel=1e-4)


def test_dense_becomes_bf16_and_comes_back_without_loss(tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "plain", Choices(dense=torch.bfloat16))
    convert(tmp_path / "plain", tmp_path / "back", Choices(dense=FP8_32))
    name = "layers.2.attn.wq_b"
    exact = weight_of(GOLDEN, name, Role.DENSE, (256, 64)).decode()
    plain = tensors_of(tmp_path / "plain")
    assert torch.equal(plain[f"{name}.weight"].float(), exact)
    assert f"{name}.scale" not in plain
    assert torch.equal(weight_of(tmp_path / "back", name, Role.DENSE, (256, 64)).decode(), exact)


def test_engram_tables_become_fp4_and_fp8_again(tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "fp4", Choices(engram=MXFP4))
    name = "layers.2.engram.embed"
    shape = (4708, 32)
    exact = weight_of(GOLDEN, name, Role.ENGRAM, shape).decode()
    coarse = weight_of(tmp_path / "fp4", name, Role.ENGRAM, shape)
    assert coarse.format is MXFP4
    assert (coarse.decode() - exact).norm() < 0.15 * exact.norm()
    convert(tmp_path / "fp4", tmp_path / "fp8", Choices(engram=FP8_ROW))
    assert torch.equal(weight_of(tmp_path / "fp8", name, Role.ENGRAM, shape).decode(), coarse.decode())


@pytest.fixture
def plain_checkpoint(tmp_path: Path) -> Path:
    """Golden weights as bf16 under the same names in one file, without quantization_config."""
    path = tmp_path / "plain"
    path.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    stored, golden = tensors_of(GOLDEN), open_safetensors(GOLDEN)
    for name, tensor in stored.items():
        if name.endswith(".weight") and name.removesuffix("weight") + "scale" in stored:
            stem = name.removesuffix(".weight")
            is_expert = ".ffn.experts." in name
            role = Role.EXPERT if is_expert else Role.ENGRAM if ".engram.embed" in name else Role.DENSE
            shape = (tensor.shape[0], tensor.shape[1] * (2 if is_expert else 1))
            tensors[name] = weight_of(golden, stem, role, shape).decode(torch.bfloat16)
        elif not name.endswith(".scale"):
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_plain_bf16_checkpoint_becomes_the_released_layout(plain_checkpoint: Path, tmp_path: Path) -> None:
    convert(plain_checkpoint, tmp_path / "out", Choices(MXFP4, FP8_32, FP8_ROW))
    released, converted = open_safetensors(GOLDEN), open_safetensors(tmp_path / "out")
    assert not converted.problems
    assert {n: (e.dtype, e.shape) for n, e in released.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in converted.entries.items()
    }
    for key, value in json.loads((GOLDEN / "config.json").read_text())["quantization_config"].items():
        assert converted.config["quantization_config"][key] == value
    for name, role, shape in (
        (EXPERT, Role.EXPERT, (128, 64)),
        ("layers.2.attn.wq_b", Role.DENSE, (256, 64)),
        ("layers.2.engram.embed", Role.ENGRAM, (4708, 32)),
    ):
        exact = weight_of(GOLDEN, name, role, shape).decode()
        found = weight_of(tmp_path / "out", name, role, shape).decode()
        assert (found - exact).norm() <= 0.02 * exact.norm(), name


def test_config_tokenizer_and_index_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("licence")
    (source / "weights.bin").write_bytes(b"pickle")
    out = tmp_path / "out"
    convert(source, out, EVERYTHING)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").is_file()
    assert (out / "LICENSE").is_file()
    assert not (out / "weights.bin").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"] == json.loads((source / "config.json").read_text())["text_config"]
    told = config["quantization_config"]
    assert (told["expert_dtype"], told["dense_dtype"], told["engram_dtype"]) == ("int4", "bf16", "fp4")
    assert not open_safetensors(out).problems
    assert {p.name for p in out.iterdir() if p.name.startswith(".")} == set()


def test_every_tensor_begins_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "out", Choices(experts=NF4))
    sizes = {"F32": 4, "BF16": 2}
    for entry in open_safetensors(tmp_path / "out").entries.values():
        assert entry.offset % sizes.get(entry.dtype, 1) == 0


KILLED = """
import os, sys
from pathlib import Path
from memory.checkpoint.checkpoint import Checkpoint
from memory.convert.files import convert_checkpoint
from memory.convert.plan import Choices
from quant.formats.nf4 import NF4

source, destination = Path(sys.argv[1]), Path(sys.argv[2])

def die_in_the_second_shard(done, total):
    if (destination / "model-00001-of-00002.safetensors").exists():
        os._exit(9)

convert_checkpoint(source, destination, Choices(experts=NF4), die_in_the_second_shard)
"""


@pytest.mark.slow
def test_killed_conversion_is_resumed_and_ends_the_same(tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    died = subprocess.run([sys.executable, "-c", KILLED, str(GOLDEN), str(out)], check=False)
    assert died.returncode == 9
    assert [f.name for f in out.glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert not (out / "config.json").exists()
    kept = (out / "model-00001-of-00002.safetensors").stat()
    errors = convert(GOLDEN, out, Choices(experts=NF4))
    assert (out / "model-00001-of-00002.safetensors").stat().st_ino == kept.st_ino
    assert errors == convert(GOLDEN, whole, Choices(experts=NF4))
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in whole.iterdir())
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def interrupted(tmp_path: Path) -> Path:
    """A destination whose conversion stopped with an exception after its first unit."""
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(GOLDEN, out, Choices(experts=NF4), stop)
    return out


def test_unfinished_conversion_of_another_kind_is_not_mixed(tmp_path: Path) -> None:
    out = interrupted(tmp_path)
    with pytest.raises(ConfigError, match="unfinished conversion with another source or other options"):
        convert(GOLDEN, out, Choices(experts=INT4_32))
    convert(GOLDEN, out, Choices(experts=NF4))


def test_source_that_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, Choices(experts=NF4), stop)
    os.utime(source / "model-00002-of-00002.safetensors", (1, 1))
    with pytest.raises(ConfigError, match="another source"):
        convert(source, out, Choices(experts=NF4))


def test_existing_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        convert(GOLDEN, tmp_path, Choices(experts=NF4))
    with pytest.raises(ConfigError, match="is a file"):
        convert(GOLDEN, tmp_path / "notes.txt", Choices(experts=NF4))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["notes.txt"]
    convert(GOLDEN, tmp_path / "out", Choices(experts=NF4))
    with pytest.raises(ConfigError, match="not empty"):
        convert(GOLDEN, tmp_path / "out", Choices(experts=NF4))


def test_two_conversions_into_one_directory_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refusals: list[str] = []

    def start_another(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(ConfigError, match="another conversion is writing here") as refusal:
                convert(GOLDEN, out, Choices(experts=NF4))
            refusals.append(str(refusal.value))

    convert_checkpoint(GOLDEN, out, Choices(experts=NF4), start_another)
    assert refusals
    assert not open_safetensors(out).problems


def test_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BudgetError, match=r"but only .* GB is free"):
        convert(GOLDEN, tmp_path / "out", Choices(experts=NF4))
    assert list(tmp_path.rglob("*.safetensors*")) == []


def test_what_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, bytes(len(data)), offset))
    with pytest.raises(CheckpointError, match="reads back differently"):
        convert(GOLDEN, tmp_path / "out", Choices(experts=NF4))
    assert list((tmp_path / "out").glob("*.safetensors")) == []


def damaged(tmp_path: Path, name: str, value: int) -> Path:
    """A copy of the golden checkpoint with one byte of tensor `name` replaced."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    entry = open_safetensors(source).entries[name]
    with entry.file.open("rb+") as file:
        file.seek(entry.offset)
        file.write(bytes([value]))
    return source


def test_damaged_scale_is_refused_with_its_tensor_named(tmp_path: Path) -> None:
    source = damaged(tmp_path, f"{EXPERT}.scale", 255)
    with pytest.raises(FormatError, match=rf"{EXPERT}\.weight, rows 0\.\."):
        convert(source, tmp_path / "out", Choices(experts=NF4))
    assert not (tmp_path / "out" / "config.json").exists()


def test_missing_scale_and_truncated_shard_are_listed_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    shard = source / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "out", Choices(experts=NF4))
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConfigError, match="can convert deepseek_v4, deepseek_v41, not llama"):
        convert(source, tmp_path / "out", Choices(experts=NF4))


PEAK = """
import resource, sys
from pathlib import Path
import torch
from memory.checkpoint.checkpoint import Checkpoint
from memory.convert.files import convert_checkpoint
from memory.convert.plan import Choices
from quant.formats.fp8 import FP8_32
from quant.formats.mxfp4 import MXFP4

def convert(name):
    quiet = lambda done, total: None
    out = Path(sys.argv[1]) / f"{name}-out"
    convert_checkpoint(Path(sys.argv[1]) / name, out, Choices(engram=MXFP4), quiet, workers=2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(convert("small"), convert("large"))
"""


def one_table(path: Path, rows: int) -> None:
    path.mkdir()
    table = torch.randn(rows, 256, dtype=torch.bfloat16)
    save_file({"layers.2.engram.embed.weight": table}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "deepseek_v41"}')


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """A table of 8 MB first, then one of 64 MB."""
    one_table(tmp_path / "small", 1 << 14)
    one_table(tmp_path / "large", 1 << 17)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    small, large = (int(kilobytes) for kilobytes in ran.stdout.split())
    assert large - small < 40_000
