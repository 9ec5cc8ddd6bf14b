"""`loci bench serve` on a real server: every figure is there, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench.streams import Timeline, percentile, throughput
from tests.server.harness import TINY, LociServer, invoke, run


@pytest.mark.slow
def test_a_server_is_compared_with_the_bare_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.json"
    monkeypatch.setenv("LOCI_STREAM_INTERVAL_MS", "0")  # or a busy machine may have answers in one piece

    result = invoke(
        "bench", "serve", TINY, "--streams", "1,16", "--tokens", "24", "--rounds", "1",
        "--long-prompt", "300", "--json", file,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    found = {item["name"]: item for item in json.loads(file.read_text())["results"]}
    for streams in (1, 16):
        assert found[f"output_token_throughput_{streams}"]["value"] > 0
        assert 0 < found[f"http_engine_ratio_{streams}"]["value"] < 10
        assert found[f"http_engine_ratio_{streams}"]["target"] == 0.95
        for name in ("ttft_ms", "itl_ms", "tpot_ms", "request_latency_ms"):
            p50, p99 = (found[f"{name}_p{p}_{streams}"]["value"] for p in (50, 99))
            assert 0 < p50 <= p99
    assert found["step_overhead_us"]["target"] == 300
    during, before = (found[f"itl_ms_p99_{when}_long_prompt"]["value"] for when in ("during", "before"))
    assert during > 0
    assert found["long_prompt_itl_p99_ratio"]["value"] == pytest.approx(during / before)
    assert "while a prompt of 300 tokens was computed" in result.stdout


def test_a_running_server_is_measured_by_its_url(server: LociServer, tmp_path: Path) -> None:
    file = tmp_path / "serve.json"

    result = invoke(
        "bench", "serve", "--url", server.url, "--streams", "2", "--tokens", "4", "--rounds", "1",
        "--long-prompt", "0", "--json", file,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    names = {item["name"] for item in json.loads(file.read_text())["results"]}
    assert "output_token_throughput_2" in names
    assert not any(name.startswith("http_engine_ratio") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "one"], "--streams 'one': expected numbers from 1 to 1024"),
        (["--url", "127.0.0.1:1"], "127.0.0.1:1: Request URL is missing"),
        (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(arguments: list[str], message: str) -> None:
    result = invoke("bench", "serve", *arguments)

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_files_of_the_folder_a_person_stands_in_are_not_run(tmp_path: Path) -> None:
    for name in ("server", "engine", "memory", "quant", "logging", "torch", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is mine')")
    flags = ("--streams", "1", "--tokens", "2", "--rounds", "1", "--long-prompt", "0")

    result = run("bench", "serve", TINY, *flags, cwd=tmp_path)

    assert (result.returncode, "tokens/s" in result.stdout) == (0, True), result.stderr
    assert result.stderr.splitlines()[-1] == "rounds: 100 %"


def test_an_error_of_the_server_is_passed_on(server: LociServer) -> None:
    result = invoke("bench", "serve", "--url", server.url, "--prompt-tokens", "5000", "--streams", "1")

    assert result.returncode == 1
    assert "maximum context length is 2048 tokens" in result.stderr


def test_figures_of_a_timeline() -> None:
    first = Timeline(sent_s=1.0, arrivals_s=[1.5, 1.7, 2.0], tokens=4)
    second = Timeline(sent_s=1.1, arrivals_s=[2.1, 3.0], tokens=6)

    assert first.ttft_s == pytest.approx(0.5)
    assert first.itl_s == pytest.approx([0.2, 0.3])
    assert first.tpot_s == pytest.approx(0.5 / 3)
    assert first.latency_s == pytest.approx(1.0)
    assert throughput([first, second]) == pytest.approx(10 / 2.0)
    assert [percentile([4, 1, 3, 2], p) for p in (0, 50, 75, 99, 100)] == [1, 2, 3, 4, 4]
