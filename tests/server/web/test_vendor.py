"""Libraries that the page brings along: licensed, listed, and part of every installation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
WEB = ROOT / "server" / "web"
VENDOR = WEB / "vendor"
FOLDERS = [path for path in VENDOR.iterdir() if path.is_dir()]


def test_every_library_has_its_licence_and_its_version_written_down() -> None:
    listed = (VENDOR / "README.md").read_text()
    assert len(FOLDERS) >= 2
    for folder in FOLDERS:
        assert "Copyright (c)" in (folder / "LICENSE").read_text()
        row = next(line for line in listed.splitlines() if f"`{folder.name}/`" in line)
        assert re.search(r"\| \d+\.\d+\.\d+ \|", row)
        assert f"`{folder.name}/LICENSE`" in row
    assert [path.name for path in VENDOR.iterdir() if path.is_file()] == ["README.md"]


def test_the_version_of_each_file_is_the_one_written_down() -> None:
    version = re.search(r"cdn-assets` \| ([\d.]+)", (VENDOR / "README.md").read_text())
    assert version is not None
    files = sorted((VENDOR / "highlight").glob("*.js"))
    assert len(files) > 20
    for path in files:
        assert version[1] in path.read_text()[:100], path


def test_every_language_that_the_page_knows_has_its_grammar() -> None:
    script = (WEB / "highlight.js").read_text()
    known = set(re.findall(r'(\w+): "', script[script.index("LANGUAGES = {") : script.index("};")]))
    held = {path.name.removesuffix(".min.js") for path in (VENDOR / "highlight").glob("*.js")}
    assert known == held - {"core"}


def test_an_installation_contains_every_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pattern,) = patterns["tool"]["setuptools"]["package-data"]["server"]
    packed = {path for path in (ROOT / "server").glob(f"{pattern}/*") if path.is_file()}
    assert packed == {path for path in WEB.rglob("*") if path.is_file()}
