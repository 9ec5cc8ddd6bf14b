"""`loci bench peers`: both sides measured in turn, ratios judged, and what is missing said in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.bench.streams import Timeline
from server.cli.bench import llama_cpp, peers
from server.cli.bench.client import Target
from server.cli.child import serving
from tests.server.harness import ROOT, TINY, invoke

PROMISED = {"decode_1": 1.05, "decode_8": 1.05, "prefill": 2.0}
RATIOS = {
    "decode_1": "llama_cpp_decode_ratio_1",
    "decode_8": "llama_cpp_decode_ratio_8",
    "prefill": "llama_cpp_prefill_ratio",
}
MIXTURES = ("gguf_moe", "gguf_gpt_oss")
FEW = ("--rounds", "1", "--tokens", "400", "--prompt-tokens", "4", "--long-prompt", "40")


@pytest.fixture(autouse=True)
def _in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait for a quiet machine, nor for gigabytes to be written."""
    monkeypatch.setattr(peers, "MOST_WAITING_S", 0.0)
    tiny = {"gguf_moe": ("qwen3-moe-tiny", 2), "gguf_gpt_oss": ("gpt-oss-tiny", 2)}
    monkeypatch.setattr(peers, "MIXTURES", tiny)


def check_report(text: str, file: Path, mixtures: Sequence[str]) -> None:
    mixed = {f"{name}_{part}": 1.0 for name in mixtures for part in ("decode", "prefill")}
    found = {r["name"]: r for r in json.loads(file.read_text())["results"]}
    for name, target in (PROMISED | mixed).items():
        ratio_name = RATIOS.get(name, f"{name}_ratio")
        ratio, ours, theirs = (found[n] for n in (ratio_name, f"loci_{name}", f"llama_cpp_{name}"))
        assert ours["unit"] == theirs["unit"] == "tokens/s"
        assert ratio["value"] == pytest.approx(ours["value"] / theirs["value"])  # of one round
        assert ratio["target"] == target
        assert ratio["met"] == (ratio["value"] >= target)
        assert f"{ratio_name}: " in text  # how far rounds differ
    assert "cores_busy_elsewhere" in found
    assert "target  met" in text


@pytest.mark.slow
def test_both_servers_are_measured_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Loci stands in for llama.cpp, whose package need not be there."""

    @contextmanager
    def serving_another(model: Path, threads: int, streams: int, context: int) -> Iterator[str]:
        flags = f"--max-num-seqs={streams}", f"--max-model-len={context}", f"--served-model-name={model.stem}"
        with serving(str(model), *flags, variables={"OMP_NUM_THREADS": str(threads)}) as url:
            yield url

    monkeypatch.setattr(llama_cpp, "serving_llama_cpp", serving_another)
    monkeypatch.setattr(llama_cpp, "check_installed", lambda: None)
    monkeypatch.setattr(llama_cpp, "describe", lambda: "llama.cpp b0 (xllamacpp 0): AVX2")
    monkeypatch.setattr("engine.embedded.model_path", lambda name: TINY)
    file = tmp_path / "peers.json"

    options = "--model", "smollm2", "--model", "gguf_moe", "--threads", "1", "--scratch", tmp_path
    result = invoke("bench", "peers", *FEW, *options, "--json", file)

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Loci ")
    assert "llama.cpp b0 (xllamacpp 0): AVX2" in result.stdout
    assert result.stderr.splitlines()[-1] == "gguf_moe, rounds: 100 %"
    check_report(result.stdout, file, ["gguf_moe"])
    assert list(tmp_path.iterdir()) == [file]  # the mixtures' files are gone


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed (extra `bench`)")
def test_llama_cpp_itself_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"

    result = invoke("bench", "peers", *FEW, "--json", file)

    assert result.returncode == 0, result.stderr
    assert f"(xllamacpp {llama_cpp.VERSION}): " in result.stdout
    check_report(result.stdout, file, MIXTURES)


def test_where_llama_cpp_is_missing_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)

    result = invoke("bench", "peers")

    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"pip install xllamacpp=={llama_cpp.VERSION}" in result.stderr
    assert "extra `bench`" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--model", "gguf_moa"), "gguf_moa: no model to compare on"),
        (("--scratch", "nowhere"), "nowhere: no such"),
    ],
)
def test_what_cannot_be_compared_on_is_refused(
    arguments: tuple[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "check_installed", lambda: None)

    result = invoke("bench", "peers", "--model", "gguf_moe", *arguments)

    assert result.returncode == 1
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_it_is_the_version_that_is_pinned() -> None:
    pinned = f"xllamacpp=={llama_cpp.VERSION}"

    assert pinned in (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    assert f'"{pinned}"' in (ROOT / "pyproject.toml").read_text()


def test_rounds_in_which_others_were_busy_do_not_count() -> None:
    rates = peers.Rates([90.0, 10.0, 110.0], [100.0, 1.0, 100.0], [0.0, 1.2, 0.1])

    assert rates.undisturbed.ratios == pytest.approx([0.9, 1.1])


def test_rounds_that_were_all_disturbed_are_all_there_is() -> None:
    rates = peers.Rates([90.0, 10.0], [100.0, 1.0], [0.3, 1.2])

    assert rates.undisturbed == rates


def test_both_get_the_same_prompts_and_take_turns_at_being_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[list[int]], int]] = []

    def answered(target: Target, prompts: list[list[int]], tokens: int) -> list[Timeline]:
        asked.append((target.model, prompts, tokens))
        every_s = 0.01 if target.model == "loci" else 0.02
        return [Timeline(0.0, [every_s * i for i in range(1, tokens + 1)], tokens) for _ in prompts]

    monkeypatch.setattr("server.cli.bench.comparison.run_http", answered)
    loci, other = (Target("http://127.0.0.1:1", name) for name in ("loci", "other"))
    races = peers.races_of(peers.SMOLLM2, prompt_tokens=4, tokens=8, long_prompt=40)

    found = peers.run(races, loci, other, rounds=2)

    assert [rates.ratios for rates in found.values()] == [pytest.approx([2.0, 2.0])] * 3
    assert found["prefill"].loci == pytest.approx([40 / 0.01] * 2)
    decoding = [(name, prompts) for name, prompts, tokens in asked if len(prompts) == 1 and tokens == 8]
    assert [name for name, _ in decoding] == ["other", "loci", "loci", "other", "other", "loci"]
    assert all(a == b for (_, a), (_, b) in zip(decoding[::2], decoding[1::2], strict=True))
    assert decoding[0][1] != decoding[2][1]
    assert {len(prompts) for _, prompts, _ in asked} == {1, 8}
    assert {len(prompts[0]) for _, prompts, _ in asked} == {4, 40}
