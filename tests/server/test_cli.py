"""The command line, as processes with pipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.server import harness
from tests.server.harness import GOLDEN, TINY, LociServer


def test_run_writes_one_answer_to_stdout() -> None:
    first, again = (
        harness.run("run", TINY, "Hello", "--max-tokens", "8", "--seed", "5", "--temperature", "0.5")
        for _ in range(2)
    )

    assert first.returncode == 0
    assert first.stdout == again.stdout
    assert first.stdout.endswith("\n")
    assert first.stderr == ""


def test_chat_through_a_pipe_answers_line_by_line(server: LociServer) -> None:
    lines = "Hello\n/reset\nHello\nand now?\n/help\n/quit\nnever read\n"

    result = harness.run("chat", "--url", server.url, "--max-tokens", "6", "--temperature", "0", stdin=lines)

    assert result.returncode == 0
    assert result.stdout.count("\n") >= 3
    assert result.stderr == "/help: no such command. /reset forgets the conversation, /quit ends.\n"
    assert server.metric("loci_http_requests_total", route="/v1/chat/completions", status="200") >= 3


def test_chat_with_a_model_of_its_own(tmp_path: Path) -> None:
    result = harness.run("chat", TINY, "--max-tokens", "6", stdin="Hello\n")

    assert result.returncode == 0
    assert result.stdout.endswith("\n")


def test_chat_says_when_no_server_is_there() -> None:
    result = harness.run("chat", "--url", "http://127.0.0.1:9", stdin="Hello\n")

    assert result.returncode == 1
    assert result.stderr.startswith("loci: http://127.0.0.1:9: ")
    assert result.stderr.endswith("is a server running there?\n")


def test_chat_takes_a_model_or_a_url() -> None:
    result = harness.run("chat", TINY, "--url", "http://127.0.0.1:9")

    assert result.returncode == 2
    assert "not both" in result.stderr


@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_logits_are_those_of_the_reference(tmp_path: Path, name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids_file, out = tmp_path / "ids.json", tmp_path / "logits.safetensors"
    ids_file.write_text(json.dumps(expected["input_ids"].tolist()))

    result = harness.run(
        "logits", GOLDEN / name, "--ids-file", ids_file, "--out", out, "--chunk", "64", "--greedy", "12"
    )

    assert result.returncode == 0, result.stderr
    found = load_file(out)
    assert found["logits"].dtype == torch.float32
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=0)
    assert found["greedy_ids"].tolist() == expected["greedy_ids"].tolist()
    assert {path.name for path in tmp_path.iterdir()} == {"ids.json", "logits.safetensors"}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("[1, 2", "not JSON"),
        ('["a"]', "expected a JSON list of token ids"),
        ("[]", "expected a JSON list of token ids"),
        ("[1, 5000]", "5000 is not a token id; the vocabulary has ids 0 to 1023"),
        (json.dumps([1] * 3000), "3000 tokens are more than the model's context of 2048"),
    ],
)
def test_wrong_ids_are_one_line_and_no_file(tmp_path: Path, ids: str, message: str) -> None:
    (tmp_path / "ids.json").write_text(ids)

    result = harness.run("logits", TINY, "--ids-file", tmp_path / "ids.json", "--out", tmp_path / "out")

    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert line.startswith("loci: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_info_tells_parts_tiers_and_peak_memory() -> None:
    result = harness.run("info", TINY)

    assert result.returncode == 0
    assert "v41-c: family deepseek_v41" in result.stdout
    assert re.search(r"^routed_experts +\S+ .* vram, dram, nvme$", result.stdout, re.MULTILINE)
    assert re.search(r"^engram +\S+ .* dram, nvme$", result.stdout, re.MULTILINE)
    assert "KV cache of one sequence of 2048 tokens: " in result.stdout
    peak = re.search(r"peak RSS after loading and 32 tokens: (\d+) MB", result.stdout)
    assert peak is not None
    assert int(peak.group(1)) < 900


def test_info_without_loading_reads_headers_alone() -> None:
    result = harness.run("info", TINY, "--no-load")

    assert result.returncode == 0
    assert "peak RSS" not in result.stdout


def test_doctor_reports_the_machine() -> None:
    result = harness.run("doctor")

    assert result.returncode == 0
    for topic in ("Python", "packages", "processor", "memory", "disk", "GPU", "kernels", "default model"):
        assert re.search(rf"^(ok|note) +{topic} ", result.stdout, re.MULTILINE), topic


def test_errors_are_one_line_and_tracebacks_only_on_request() -> None:
    plain = harness.run("info", "/nowhere")
    debug = harness.run("info", "/nowhere", LOCI_DEBUG="1")

    assert plain.returncode == debug.returncode == 1
    assert len(plain.stderr.splitlines()) == 1
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("command", ["serve", "chat", "run", "info", "logits", "doctor"])
def test_each_command_explains_itself_with_an_example(command: str) -> None:
    result = harness.run(command, "--help")

    assert result.returncode == 0
    assert f"Example: loci {command}" in result.stdout
