"""`loci bench context` fills a context and says what it costs, by depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.server.harness import TINY, invoke

FEW = ("--steps", "2", "--chunk", "64", "--no-needles")


def test_decoding_prefill_and_memory_are_reported_by_depth(tmp_path: Path) -> None:
    file = tmp_path / "context.json"
    result = invoke("bench", "context", TINY, "--depths", "1500,256", *FEW, "--json", file)
    assert result.returncode == 0, result.stderr
    found = {each["name"]: each for each in json.loads(file.read_text())["results"]}
    assert {"context_decode_256", "context_decode_1500", "context_prefill_256"} <= found.keys()
    assert found["context_kv_bytes_per_token"]["value"] > 0
    assert found["context_planned_1500"]["value"] > found["context_planned_256"]["value"]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["256", "128"] in [line[:2] for line in lines]
    assert ["1,500", "128"] in [line[:2] for line in lines], "two chunks are computed"


def test_the_deepest_is_as_deep_as_the_model_can() -> None:
    result = invoke("bench", "context", TINY, *FEW)
    assert result.returncode == 0, result.stderr
    assert "1,980" in result.stdout, "of 2048, a chunk and the steps less"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depths", "many"), "--depths many: expected numbers of tokens, such as 8192,131072"),
        (("--depths", "0"), "expected numbers of tokens from 1 on"),
        (("--depths", "4096"), "are beyond the 2,048 that v41-c can; name smaller --depths"),
    ],
)
def test_depths_that_cannot_be_are_one_line(arguments: tuple[str, str], message: str) -> None:
    result = invoke("bench", "context", TINY, *arguments, *FEW)
    assert result.returncode == 1
    assert message in result.stderr
