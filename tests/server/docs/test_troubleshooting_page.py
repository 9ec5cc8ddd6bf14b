"""docs/troubleshooting.md quotes messages that the program really says."""

from __future__ import annotations

import ast
import re

import pytest

from tests.server.harness import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def literals() -> set[str]:
    """Every string of the sources, what varies in it as …."""
    found = set()
    for room in ("server", "engine", "memory", "quant"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(re.sub(r"%(\.\d)?[sdfr]", "…", node.value))
    return found


SOURCES = literals()


@pytest.mark.parametrize("message", QUOTED)
def test_the_program_has_each_quoted_message(message: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))

    assert any(re.search(pattern, literal, re.DOTALL) for literal in SOURCES), message


def test_messages_are_quoted() -> None:
    assert len(QUOTED) >= 25
