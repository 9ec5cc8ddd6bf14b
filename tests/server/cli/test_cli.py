"""The command line, as processes with pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.embedded import model_path
from quant.errors import ConfigError
from tests.server import harness
from tests.server.harness import GOLDEN, ROOT, TINY, LociServer, invoke


def test_run_writes_one_answer_to_stdout() -> None:
    flags = ("--max-tokens", "8", "--seed", "5", "--temperature", "0.5")
    first, again = (invoke("run", TINY, "Hello", *flags) for _ in range(2))

    assert first.returncode == 0
    assert first.stdout == again.stdout
    assert first.stdout.endswith("\n")


@pytest.mark.slow
def test_chat_through_a_pipe_answers_line_by_line(server: LociServer) -> None:
    lines = "Hello\n/reset\nHello\nand now?\n/help\n/quit\nnever read\n"

    result = harness.run("chat", "--url", server.url, "--max-tokens", "6", "--temperature", "0", stdin=lines)

    assert result.returncode == 0
    assert result.stdout.count("\n") >= 3
    assert result.stderr == "/help: no such command. /reset clears the conversation, /quit exits.\n"
    assert server.metric("loci_http_requests_total", route="/v1/chat/completions", status="200") >= 3


@pytest.mark.slow
def test_chat_in_a_terminal_prompts_and_goes_on_after_an_error(server: LociServer) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        harness.command("chat", "--url", server.url, "--max-tokens", "4", "--system", "Be kind."),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=ROOT,
        env=harness.environment(TERM="dumb"),
    )
    try:
        assert "Chatting with v41-c" in _read_until(controller, "\n> ")
        os.write(controller, b"word " * 700 + b"\n")
        assert "maximum context length is 2048" in _read_until(controller, "\n> ")
        os.write(controller, b"Hello\n")
        _read_until(controller, "\n> ")
        os.write(controller, b"/quit\n")
        assert process.wait(harness.DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
        os.close(terminal)


@pytest.mark.slow
def test_chat_with_a_model_of_its_own(tmp_path: Path) -> None:
    result = harness.run("chat", TINY, "--max-tokens", "6", stdin="Hello\n")

    assert result.returncode == 0
    assert result.stdout.endswith("\n")


@pytest.mark.slow
def test_chat_says_when_no_server_is_there() -> None:
    result = harness.run("chat", "--url", "http://127.0.0.1:9", stdin="Hello\n")

    assert result.returncode == 1
    assert result.stderr.startswith("loci: http://127.0.0.1:9: ")
    assert result.stderr.endswith("is a server running there?\n")


@pytest.mark.slow
def test_chat_takes_a_model_or_a_url() -> None:
    result = harness.run("chat", TINY, "--url", "http://127.0.0.1:9")

    assert result.returncode == 2
    assert "not both" in result.stderr


@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_logits_are_those_of_the_reference(tmp_path: Path, name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids_file, out = tmp_path / "ids.json", tmp_path / "logits.safetensors"
    ids_file.write_text(json.dumps(expected["input_ids"].tolist()))

    result = invoke(
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
        (json.dumps([1] * 3000), "3000 tokens exceed the model's context of 2048"),
    ],
)
def test_wrong_ids_are_one_line_and_no_file(tmp_path: Path, ids: str, message: str) -> None:
    (tmp_path / "ids.json").write_text(ids)

    result = invoke("logits", TINY, "--ids-file", tmp_path / "ids.json", "--out", tmp_path / "out")

    (line,) = harness.complaint(result.stderr).splitlines()
    assert result.returncode == 1
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_info_tells_parts_tiers_and_peak_memory() -> None:
    result = harness.run("info", TINY)

    assert result.returncode == 0
    assert "v41-c: family deepseek_v41" in result.stdout
    assert re.search(r"^routed_experts +\S+ .* vram, dram, nvme$", result.stdout, re.MULTILINE)
    assert re.search(r"^engram +\S+ .* dram, nvme$", result.stdout, re.MULTILINE)
    assert "KV cache of one sequence of 2048 tokens: " in result.stdout
    assert _megabytes_for_the_model(result.stdout) < 60


@pytest.mark.slow
def test_smollm2_stays_packed_in_memory() -> None:
    try:
        path = model_path(Path("smollm2"))
    except ConfigError as error:
        pytest.skip(str(error))

    result = harness.run("info", "smollm2")

    assert result.returncode == 0
    # 97 MB packed, of which what importing freed may serve for some; as float32 it would be 540 MB.
    assert 0.5 * path.stat().st_size < _megabytes_for_the_model(result.stdout) * 1e6 < 300e6


def test_info_prints_the_recorded_decode_step() -> None:
    result = invoke("info", TINY, "--program", "--dram-budget", "1.34MB")

    assert result.returncode == 0
    assert re.search(
        r"A decode step of up to 16 sequences is recorded: \d+ operations in .* of buffers", result.stdout
    )
    assert re.search(r"^linear +\d+ +\d", result.stdout, re.MULTILINE)
    assert re.search(r"^before and after +\d+ +\d", result.stdout, re.MULTILINE)
    assert "hand-overs each" in result.stdout


def test_info_without_loading_reads_headers_alone() -> None:
    result = invoke("info", TINY, "--no-load")

    assert result.returncode == 0
    assert "Not loaded" in result.stdout
    assert "peak RSS" not in result.stdout


def _read_until(terminal: int, end: str) -> str:
    """What a terminal shows until it shows `end` last."""
    seen = ""
    stop = time.monotonic() + 30
    while not seen.endswith(end):
        ready, _, _ = select.select([terminal], [], [], max(0.0, stop - time.monotonic()))
        assert ready, f"not seen in time: {end!r}; seen: {seen!r}"
        seen += os.read(terminal, 65536).decode(errors="replace").replace("\r\n", "\n")
    return seen


def _megabytes_for_the_model(text: str) -> int:
    found = re.search(r"peak RSS after loading and 32 tokens: (\d+) MB \((\d+) MB of it before", text)
    assert found is not None
    return int(found.group(1)) - int(found.group(2))


@pytest.mark.slow
def test_doctor_reports_the_machine() -> None:
    result = harness.run("doctor")

    assert result.returncode == 0
    for topic in (
        "Python",
        "packages",
        "processor",
        "memory",
        "disk",
        "GPU",
        "kernels",
        "embedded model demo",
    ):
        assert re.search(rf"^(ok|note) +{topic} ", result.stdout, re.MULTILINE), topic


@pytest.mark.slow
def test_errors_are_one_line_and_tracebacks_only_on_request() -> None:
    plain = invoke("info", "/nowhere")
    debug = harness.run("info", "/nowhere", LOCI_DEBUG="1")

    assert plain.returncode == debug.returncode == 1
    assert len(harness.complaint(plain.stderr).splitlines()) == 1
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("command", ["serve", "chat", "run", "info", "logits", "doctor"])
def test_each_command_explains_itself_with_an_example(command: str) -> None:
    result = invoke(command, "--help")

    assert result.returncode == 0
    assert f"Example: loci {command}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_slice_that_is_given_up_half_written_leaves_nothing(
    tmp_path: Path, how: signal.Signals, code: int
) -> None:
    arguments = ("v41-tiny", "--layers", "3", "--engram-rows", "20000000", "--out", tmp_path / "slice")
    with subprocess.Popen(
        harness.command("synth", *arguments), cwd=ROOT, env=harness.environment(), stdout=subprocess.PIPE
    ) as synth:
        assert synth.stdout is not None
        assert synth.stdout.readline().startswith(b" 10 %")
        synth.send_signal(how)
        assert synth.wait(harness.DEADLINE_S) == code
    assert list(tmp_path.iterdir()) == []
