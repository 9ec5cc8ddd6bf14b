"""GGUF files of random weights: typed as released, read by llama.cpp alike, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.families.base import Batch
from engine.families.loader import load, open_checkpoint
from engine.synthetic_gguf import SHAPES, plan_gguf, plan_of
from memory.checkpoint.random_blocks import KINDS, RandomValues
from memory.checkpoint.random_files import PIECE_BYTES
from memory.checkpoint.random_gguf import write_gguf
from memory.checkpoint.reads import read_tensor
from memory.planner.budget import MemoryBudget
from quant.errors import BudgetError, ConfigError
from quant.formats.gguf import weight_from_bytes
from quant.packed import PackedTensor
from tests.engine.families.llama_cpp_logits import next_log_probabilities
from tests.server.harness import invoke

TINY = ("qwen3-moe-tiny", "gpt-oss-tiny")
PROMPTS = [[300, 17, 950, 42, 42, 611], list(range(900, 1000, 3))]  # longer than gpt-oss-tiny's window


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A shape's file with two layers, written once."""

    @cache
    def written(name: str) -> Path:
        out = tmp_path_factory.mktemp("synth") / f"{name}.gguf"
        write_gguf(plan_gguf(name, 2), out, ignore)
        return out

    return written


def last_logits(file: Path) -> torch.Tensor:
    """After each prompt, `[prompts, vocabulary]`."""
    loaded = load(file, MemoryBudget(64 << 20))
    try:
        cache_ = loaded.model.new_cache(len(PROMPTS), 64)
        return loaded.model.forward(Batch.of([(n, 0, ids) for n, ids in enumerate(PROMPTS)]), cache_)
    finally:
        loaded.model.close()


@pytest.mark.parametrize("name", TINY)
def test_a_file_answers_finite_logits_that_differ_by_prompt(
    name: str, file_of: Callable[[str], Path]
) -> None:
    logits = last_logits(file_of(name))
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert not torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed (extra `bench`)")
@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_finds_the_same_tokens_likely(name: str, file_of: Callable[[str], Path]) -> None:
    """As far as its activations of eight bits go."""
    ours = last_logits(file_of(name)).log_softmax(-1)
    theirs = torch.tensor(next_log_probabilities(file_of(name), PROMPTS))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.999
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("dtype", KINDS)
def test_random_values_spread_as_asked(dtype: str) -> None:
    filling = RandomValues(dtype, 0.02).filling("name", 0, 1 << 16)
    data = torch.from_numpy(filling.content(filling.nbytes, np.random.default_rng(3)))
    weight = weight_from_bytes(dtype, (256, 256), data)
    values = weight.decode() if isinstance(weight, PackedTensor) else weight
    assert 0.01 < values.std() < 0.03
    assert values.mean().abs() < 0.002


def test_types_are_those_of_the_releases(file_of: Callable[[str], Path]) -> None:
    qwen, gpt_oss = ({n: e.dtype for n, e in open_checkpoint(file_of(name)).entries.items()} for name in TINY)
    assert [qwen[f"blk.{n}.ffn_down_exps.weight"] for n in range(2)] == ["Q4_K", "Q6_K"]
    assert qwen["output.weight"] == "Q6_K"
    assert qwen["blk.0.ffn_gate_inp.weight"] == "F32"
    assert gpt_oss["blk.0.ffn_up_exps.weight"] == "MXFP4"
    assert gpt_oss["blk.0.attn_q.weight"] == gpt_oss["output.weight"] == "Q8_0"
    assert gpt_oss["blk.0.attn_sinks.weight"] == gpt_oss["blk.0.ffn_up_exps.bias"] == "F32"


def test_half_of_the_layers_of_a_whole_release_have_more_bits() -> None:
    tensors = plan_gguf("qwen3-30b-a3b", 48).tensors
    downs = [values.dtype for name, (_, values) in tensors.items() if "ffn_down_exps" in name]
    assert (downs.count("Q4_K"), downs.count("Q6_K")) == (24, 24)
    assert tensors["output.weight"][0] == (151936, 2048)


def test_the_head_keeps_its_share_of_few_layers() -> None:
    assert plan_gguf("qwen3-30b-a3b", 4).tensors["output.weight"][0] == (12608, 2048)


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(
    tmp_path: Path, file_of: Callable[[str], Path]
) -> None:
    plan = plan_gguf("gpt-oss-tiny", 2)
    write_gguf(plan, tmp_path / "again", ignore, workers=3)
    write_gguf(plan, tmp_path / "other", ignore, seed=1)
    first = file_of("gpt-oss-tiny").read_bytes()
    assert first == (tmp_path / "again").read_bytes()
    assert first != (tmp_path / "other").read_bytes()


def test_a_tensor_of_several_pieces_has_whole_blocks(tmp_path: Path) -> None:
    config = SHAPES["qwen3-moe-tiny"] | {"vocab_size": 1 << 18}
    write_gguf(plan_of(config, 8, "wide"), tmp_path / "wide.gguf", ignore)
    entry = open_checkpoint(tmp_path / "wide.gguf").entries["token_embd.weight"]
    assert entry.nbytes > 2 * PIECE_BYTES
    weight = weight_from_bytes(entry.dtype, entry.shape, read_tensor(entry))
    assert isinstance(weight, PackedTensor)
    assert 0.9 < weight.decode().std() < 1.2


@pytest.mark.parametrize(
    ("changes", "layers", "problem"),
    [
        ({"hidden_size": 384}, 2, r"has 384 columns, which Q4_K cannot store; expected a multiple of 256"),
        ({"moe_intermediate_size": 160}, 2, r"ffn_down_exps.weight has 160 columns"),
        ({}, 0, "0 layers; expected 1 to 8"),
        ({}, 9, "9 layers; expected 1 to 8"),
    ],
)
def test_files_that_cannot_be_are_refused(changes: dict[str, int], layers: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        plan_of(SHAPES["qwen3-moe-tiny"] | changes, layers, "mine")


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("memory.checkpoint.random_files.shutil.disk_usage", lambda _: full)
    with pytest.raises(BudgetError, match=r"but only .* is free"):
        write_gguf(plan_gguf("gpt-oss-tiny", 2), tmp_path / "out.gguf", ignore)
    assert list(tmp_path.iterdir()) == []


def test_what_was_cut_short_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(plan_gguf("gpt-oss-tiny", 2), tmp_path / "out.gguf", stop)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_file_and_overwrites_none(tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    written = invoke("synth", "gpt-oss-tiny", "--layers", "1", "--out", out)
    assert written.returncode == 0, written.stderr
    assert written.stdout.splitlines()[-1].startswith(f"{out}: ")
    again = invoke("synth", "gpt-oss-tiny", "--layers", "1", "--out", out)
    assert again.returncode == 1
    assert "already exists" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("gpt-oss-tiny", "--engram-rows", "100"), "--engram-rows and --experts are for DeepSeek-V4.1"),
        (("v41-tiny",), "v41-tiny: --engram-rows says how large"),
        (("gpt-oss-20",), "gpt-oss-20: unknown shape; known: "),
    ],
)
def test_options_that_do_not_fit_the_shape_are_refused_in_a_line(
    arguments: tuple[str, ...], problem: str, tmp_path: Path
) -> None:
    result = invoke("synth", *arguments, "--layers", "3", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1
