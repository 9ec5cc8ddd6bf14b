"""Experts in another format than released: encoded once, the same bits wherever they lie, refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.embedded import model_path
from engine.families.decoder.config_only import config_shape
from engine.families.decoder.experts import DecoderExpertFiles
from engine.families.decoder.family import DecoderFamily
from engine.families.decoder.forward import Decoder
from engine.families.decoder.reencoded import CHOICES, ReencodedCheckpoint
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from engine.families.shapes import shape_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.convert.experts import remove_orphans
from memory.convert.units import read_bytes
from memory.planner.budget import MemoryBudget
from quant.convert import convert_rows
from quant.errors import BudgetError, ConfigError, LociError
from quant.formats.stored_matrix import from_mxfp4_blocks
from quant.kernels.choice import choose
from quant.packed import PackedTensor
from tests.engine.families.as_gguf import write_as_gguf
from tests.engine.families.golden_families import PLENTY, family_path, golden_family, logits_in_chunks
from tests.engine.families.test_decoder_tiers import answer, budget_of
from tests.engine.families.tiny_llama import tiny_values, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loci" / "experts"


def reencoded(path: Path, experts: str) -> tuple[DecoderFamily, ReencodedCheckpoint]:
    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint)
    assert isinstance(family, DecoderFamily)
    found = family.reencoded(checkpoint, experts)
    assert isinstance(found, ReencodedCheckpoint)
    return family, found


def logits_of(family: DecoderFamily, checkpoint: Checkpoint, ids: list[int]) -> torch.Tensor:
    model = family.load(checkpoint, choose(), PLENTY)
    try:
        return logits_in_chunks(model, ids, [64])
    finally:
        model.close()


def matrix_of(family: DecoderFamily, checkpoint: Checkpoint, expert: int, number: int) -> PackedTensor:
    files = DecoderExpertFiles.of(family.description(checkpoint), checkpoint)
    entries = files.entries(1, expert, number)
    return files.matrix(1, expert, number, {e.name: read_bytes(e, 0, e.nbytes) for e in entries})


def bf16_gpt_oss(folder: Path) -> Path:
    """The golden gpt-oss with the numbers of its MXFP4 experts, which bfloat16 holds exactly."""
    source = family_path("gpt_oss")
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("model-*.safetensors"):
        tensors |= load_file(file)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        blocks, scales = tensors.pop(name), tensors.pop(name.replace("_blocks", "_scales"))
        shape = (blocks.shape[1], blocks.shape[2] * 32)
        pairs = zip(blocks, scales, strict=True)
        plain = [from_mxfp4_blocks(shape, codes, scale).decode() for codes, scale in pairs]
        tensors[name.removesuffix("_blocks")] = torch.stack(plain).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("experts", CHOICES)
@pytest.mark.parametrize("name", ["qwen3_moe_fp8", "deepseek_v3"])
def test_every_expert_is_the_stored_one_in_the_new_format(name: str, experts: str) -> None:
    family, checkpoint = reencoded(family_path(name), experts)
    family.load(checkpoint, choose(), PLENTY).close()
    for number in range(3):
        found = matrix_of(family, checkpoint, 3, number)
        expected, error = convert_rows(matrix_of(family, checkpoint.source, 3, number), found.format)
        assert isinstance(expected, PackedTensor)
        assert found.format.name.startswith(experts)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.decode(), expected.decode())
        assert 0 < error.relative < 0.15


def test_numbers_that_the_format_holds_give_the_released_bits(tmp_path: Path) -> None:
    golden = golden_family("gpt_oss")
    released = open_checkpoint(golden.path)
    family, checkpoint = reencoded(bf16_gpt_oss(tmp_path / "bf16"), "mxfp4")
    expected = logits_of(family, released, golden.ids())
    assert torch.equal(logits_of(family, checkpoint, golden.ids()), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "experts"), [("qwen3_moe_fp8", "nf4"), ("minimax_m2", "int4")])
def test_answers_are_the_same_bits_wherever_experts_lie(name: str, experts: str, tmp_path: Path) -> None:
    golden = golden_family(name)
    path = golden.path if experts == "nf4" else write_as_gguf(golden.path, tmp_path / "stacked.gguf")
    family, checkpoint = reencoded(path, experts)
    shape = shape_of(checkpoint)
    answers, tiers = [], set[str]()
    for limits in (PLENTY, budget_of(shape, 4), budget_of(shape, 4, 4, 5)):
        model = family.load(checkpoint, choose(), limits)
        assert isinstance(model, Decoder)
        answers.append(answer(model, golden.ids()))
        tiers |= {tier for layer in model.expert_tiers() for tier in layer}
        model.close()
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert tiers == {"nvme", "dram", "vram:0", "vram:1"}


def test_experts_are_encoded_once_and_again_only_for_other_files(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(family_path("qwen3_moe_fp8"), copy)
    family, checkpoint = reencoded(copy, "nf4")
    assert not cache.exists()  # nothing is written to look at it
    ids = golden_family("qwen3_moe_fp8").ids(".1")
    first = logits_of(family, checkpoint, ids)
    (folder,) = cache.iterdir()
    assert folder.name.startswith("model-nf4-")
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert len(written) == 3
    family, checkpoint = reencoded(copy, "nf4")
    assert torch.equal(logits_of(family, checkpoint, ids), first)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")} == written

    sorted(copy.glob("model-*.safetensors"))[0].touch()
    logits_of(*reencoded(copy, "nf4"), ids)
    assert len(list(cache.iterdir())) == 2

    assert remove_orphans(copy) == 0
    shutil.rmtree(copy)
    assert remove_orphans(tmp_path / "other") == 0
    assert remove_orphans(copy) > 2 * sum(
        entry.nbytes for name, entry in checkpoint.entries.items() if "encoded" in name
    )
    assert not list(cache.iterdir())


def test_what_was_cut_short_is_finished(cache: Path) -> None:
    family, checkpoint = reencoded(family_path("qwen3_moe_fp8"), "int4")
    ids = golden_family("qwen3_moe_fp8").ids(".1")
    whole = logits_of(family, checkpoint, ids)
    first, second, third = sorted(cache.glob("*/*.safetensors"))
    second.unlink()
    third.write_bytes(third.read_bytes()[:1000])
    kept = first.stat().st_mtime_ns
    assert torch.equal(logits_of(*reencoded(family_path("qwen3_moe_fp8"), "int4"), ids), whole)
    assert first.stat().st_mtime_ns == kept
    assert not list(cache.glob("*/*.part"))


def test_room_in_memory_and_on_disk_is_looked_at_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, checkpoint = reencoded(family_path("qwen3_moe_fp8"), "nf4")
    with pytest.raises(BudgetError, match="weights used by every token need"):
        family.load(checkpoint, choose(), MemoryBudget(1000))
    assert not cache.exists()
    usage = shutil.disk_usage(Path.cwd())._replace(free=1000)
    monkeypatch.setattr("memory.convert.experts.shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        BudgetError, match=r"experts as nf4 need .* GB there, but only 0\.0 GB is free; .*XDG_CACHE_HOME"
    ):
        family.load(checkpoint, choose(), PLENTY)
    assert not list(cache.glob("*/*.safetensors"))


def test_where_nothing_can_be_kept_a_line_says_how_to_keep_it_elsewhere(cache: Path) -> None:
    family, checkpoint = reencoded(family_path("qwen3_moe_fp8"), "nf4")
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    with pytest.raises(ConfigError, match=r"Not a directory; experts .* are kept in .*; set XDG_CACHE_HOME"):
        family.load(checkpoint, choose(), PLENTY)


def test_experts_that_are_not_numbers_are_named_and_nothing_is_left(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(family_path("mixtral"), copy)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    for file in copy.glob("model-*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][3, 5] = float("nan")
            save_file(tensors, file)
    family, checkpoint = reencoded(copy, "mxfp4")
    with pytest.raises(LociError, match=f"{name}, rows from 0 on: .*NaN"):
        family.load(checkpoint, choose(), PLENTY)
    assert [file.name[:13] for file in cache.glob("*/*.safetensors")] == ["experts-00001"]


@pytest.mark.parametrize(
    ("name", "experts", "message"),
    [
        ("gpt_oss", "nf4", "the routed experts are mxfp4 already; only BF16, F16, F32 and FP8"),
        ("kimi_k2", "mxfp4", "the routed experts are int4_32 already"),
        ("gguf_qwen3moe", "nf4", "the routed experts are .*q4_k.* already"),
        (
            "granitemoe",
            "mxfp4",
            "rows of 48 columns, which are not whole blocks of 32; choose another format",
        ),
        ("olmoe", "nf4", "rows of 32 columns, which are not whole blocks of 64"),
    ],
)
def test_experts_that_cannot_be_encoded_are_refused_by_name(name: str, experts: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--experts {experts}: .*(?i:{message})"):
        reencoded(golden_family(name).path, experts)


def test_models_without_such_experts_are_refused(tmp_path: Path) -> None:
    dense = open_checkpoint(write_gguf(tmp_path / "dense.gguf", tiny_values()))
    with pytest.raises(
        ConfigError, match=r"--experts nf4: .*dense\.gguf has no routed experts; leave it out"
    ):
        family_of(dense).reencoded(dense, "nf4")
    demo = open_checkpoint(model_path("demo"))
    with pytest.raises(ConfigError, match=r"experts of the deepseek_v41 family .* `loci quantize` converts"):
        family_of(demo).reencoded(demo, "nf4")


@pytest.mark.parametrize("experts", CHOICES)
def test_a_config_alone_weighs_what_the_encoded_checkpoint_does(experts: str) -> None:
    path = family_path("deepseek_v3")
    _, checkpoint = reencoded(path, experts)
    config = json.loads((path / "config.json").read_text())
    assert config_shape(config, "deepseek_v3", experts) == shape_of(checkpoint)
    assert shape_of(checkpoint).expert_nbytes < 0.57 * shape_of(checkpoint.source).expert_nbytes
