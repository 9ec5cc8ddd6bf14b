"""`loci quantize` as a person sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from memory.checkpoint.safetensors_files import open_safetensors
from quant.errors import ConfigError
from server.cli.quantize import quantize

GOLDEN = Path("tests/golden/v41-c")
app = typer.Typer()
app.command()(quantize)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_experts_and_dense_are_converted_and_reported(tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    result = run(GOLDEN, out, "--experts", "nf4", "--dense", "bf16", "--engram", "fp4", "--report", report)
    assert result.exit_code == 0, result.output
    assert not open_safetensors(out).problems
    tensors = {tensor["name"]: tensor for tensor in json.loads(report.read_text())["tensors"]}
    expert = tensors["layers.0.ffn.experts.0.w1.weight"]
    assert (expert["source"], expert["target"]) == ("mxfp4", "nf4")
    assert 0 < expert["relative_error"] < 0.1
    assert tensors["layers.0.attn.wq_a.weight"]["relative_error"] == 0
    assert tensors["layers.2.engram.embed.weight"]["target"] == "mxfp4"


def test_output_without_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    result = run(GOLDEN, tmp_path / "out", "--experts", "int4", "--int4-group", "64", "--int4-offset")
    lines = result.output.splitlines()
    assert any(line.startswith("100 %") for line in lines)
    assert any("mxfp4 -> int4_offset_64" in line for line in lines)
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GOLDEN, "OUT"], "nothing to convert"),
        ([GOLDEN, GOLDEN, "--experts", "nf4"], "not empty"),
        (["pyproject.toml", "OUT", "--experts", "nf4"], "expected a safetensors directory"),
        ([GOLDEN, "OUT", "--experts", "nf4", "--report", "missing/report.json"], "no such directory"),
        (
            [GOLDEN, "OUT", "--dense", "fp8", "--experts", "int4", "--int4-group", "128"],
            "not a multiple of 128",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_error(
    arguments: list[str | Path], message: str, tmp_path: Path
) -> None:
    result = run(*(tmp_path / "out" if argument == "OUT" else argument for argument in arguments))
    assert isinstance(result.exception, Exception)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_both_checkpoints_are_compared_on_a_text(tmp_path: Path) -> None:
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 8)
    result = run(GOLDEN, tmp_path / "out", "--experts", "nf4", "--eval", text, "--report", report)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
    evaluation = json.loads(report.read_text())["evaluation"]
    assert evaluation["tokens"] > 50
    assert evaluation["mean_kl"] > 0
    assert evaluation["perplexity_after"] != evaluation["perplexity_before"]
    assert 0 < evaluation["top1_agreement"] < 1


def test_text_that_cannot_be_read_is_refused_before_converting(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    for name, message in (("text.txt", "not UTF-8"), ("missing.txt", "No such file")):
        result = run(GOLDEN, tmp_path / "out", "--experts", "nf4", "--eval", tmp_path / name)
        assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_unknown_format_is_a_usage_error(tmp_path: Path) -> None:
    result = run(GOLDEN, tmp_path / "out", "--experts", "q4_k")
    assert result.exit_code == 2
    assert "q4_k" in result.output
    assert "nf4" in result.output


def test_resumed_conversion_says_what_was_finished_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import memory.convert.files as files

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(files, "_finish", lambda *arguments: (_ for _ in ()).throw(ConfigError("cut short")))
        assert str(run(GOLDEN, out, "--experts", "nf4").exception) == "cut short"
    assert "already done" in run(GOLDEN, out, "--experts", "nf4").output
