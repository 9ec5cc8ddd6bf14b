"""CONTRIBUTING.md sends newcomers to files, names and targets that are there."""

from __future__ import annotations

import re

import pytest

from tests.server.harness import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FOLDER = re.compile(r"(?:server|engine|memory|quant|tests|deploy|docs|\.ci)/[\w/.-]*")
NAMED = sorted({name for name in FOLDER.findall(PAGE) if "NAME" not in name})
TARGETS = sorted(set(re.findall(r"\bmake ([a-z]+)", PAGE)))
SYMBOLS = sorted(set(re.findall(r"`(_?[A-Z][A-Za-z]*(?:_[A-Z]+)*|[a-z]+(?:_[a-z]+)+)`", PAGE)))
SOURCES = (
    path
    for folder in ("server", "engine", "memory", "quant", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".hpp")
)
WORDS = {word for path in SOURCES for word in re.findall(r"\w+", path.read_text())}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_file_exists(name: str) -> None:
    assert (ROOT / name).exists()


def test_every_named_target_of_make_exists() -> None:
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert TARGETS
    assert set(TARGETS) <= set(rules)


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_named_symbol_is_in_the_code(name: str) -> None:
    assert name in WORDS
