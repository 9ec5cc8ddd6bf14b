"""No document tells anybody to install somebody else's package, or to ask an index for Loci."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.harness import ROOT

# Loci as the bare name of a package; a path or a file (./loci, loci/, loci.whl) is none.
BARE_NAME = re.compile(
    r"\b(?:pip3?|pipx|uv|poetry|conda|mamba)\b[^`\n]*\b(?:install|add|inject|run|download|wheel)\b[^`\n]*?"
    r"(?<![\w./:-])loci(?:-server)?(?:\[[\w,]*\])?(?![\w/.-])"
    r"|\buvx\s+(?:--\S+\s+)*loci(?:-server)?(?![\w/.-])"
)
TEXTS = {".md", ".py", ".toml", ".txt", ".service", ".yaml", ".yml", ".html", ".js", ".cpp", ".hpp", ""}


def files() -> Iterator[Path]:
    """The repository's own texts; git says which are, or all that lie there where git does not."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    found = [ROOT / name for name in names if name] or [
        path
        for top in ("README.md", "CHANGELOG.md", "Makefile", "Dockerfile", "docs", "deploy", ".ci", "server")
        for path in [ROOT / top, *(ROOT / top).rglob("*")]
    ]
    yield from (p for p in found if p.is_file() and p.suffix in TEXTS and p != Path(__file__).resolve())


def test_no_line_installs_loci_by_its_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {found.group()}"
        for path in files()
        for found in BARE_NAME.finditer(path.read_text(errors="replace"))
    ]

    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "/opt/loci/bin/pip install loci",
        "pip install 'loci[gpu]'",
        "pip install --upgrade loci",
        "pipx install loci-server",
        "uv tool install loci",
        "uvx loci serve",
        "uv pip install torch loci",
        "python3 -m venv x; x/bin/python -m pip install loci==0.1.0",
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert BARE_NAME.search(line)


@pytest.mark.parametrize(
    "line",
    [
        "pip install .",
        "pip install ./loci",
        "pip install /opt/loci/",
        "pipx install dist/loci_server-0.1.0-cp311-cp311-linux_x86_64.whl",
        "pipx uninstall loci-server",
        "make install APPLICATION=/opt/loci",
        "docker build -t loci .",
    ],
)
def test_other_lines_are_left_in_peace(line: str) -> None:
    assert not BARE_NAME.search(line)
