"""Commands in README and docs/ exist, with the options that they are written with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import typer

from server.cli.commands import app
from tests.server.harness import ROOT

FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text() for path in FILES if path.name != "CHANGELOG.md"}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
ROOT_COMMAND = typer.main.get_command(app)
OTHERS = {"--clients", "--endpoint-type", "--ulimit"}  # of load.py, aiperf, docker


def commands(page: str) -> Iterator[str]:
    """What begins with `loci` in a block of code or in a line of text, without the comment behind it."""
    joined = page.replace("\\\n", " ")
    for block in re.findall(r"^```.*?\n(.*?)^```", joined, re.MULTILINE | re.DOTALL):
        yield from re.findall(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?loci ([^#\n]+)", block, re.MULTILINE)
    yield from re.findall(r"`loci ([a-z][^`\n]*)`", joined)


Command = Any  # click's, or typer's own copy of it, as the version has it


def options_of(command: Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}


def resolved(words: list[str]) -> Command:
    """The command that the first words name."""
    command = ROOT_COMMAND
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words[0]]
        words = words[1:]
    return command


EVERY = [(name, text.strip()) for name, page in PAGES.items() for text in commands(page)]


@pytest.mark.parametrize(("page", "text"), EVERY, ids=[f"{page}: {text[:40]}" for page, text in EVERY])
def test_a_command_exists_with_its_options(page: str, text: str) -> None:
    command = resolved(text.split())

    assert command is not ROOT_COMMAND or text.startswith("-"), text
    assert set(OPTION.findall(text)) <= options_of(command)


def test_options_that_stand_alone_belong_to_some_command() -> None:
    def all_options(command: Command) -> set[str]:
        inner = getattr(command, "commands", {}).values()
        return options_of(command).union(*(all_options(each) for each in inner))

    known = all_options(ROOT_COMMAND) | OTHERS
    named = {
        option for page in PAGES.values() for option in re.findall(r"`(--[a-z][a-z-]*)(?: [^`]*)?`", page)
    }
    assert named - known == set()


def test_scripts_exist() -> None:
    text = "\n".join(PAGES.values())
    modules = set(re.findall(r"python -m ((?:tests|server|deploy)[\w.]*)", text))
    files = set(re.findall(r"python3? ((?:tests|server|deploy)/[\w/]+\.py)", text))

    assert modules
    assert files
    assert {module for module in modules if find_spec(module) is None} == set()
    assert {file for file in files if not (ROOT / file).is_file()} == set()


def test_links_between_pages_lead_somewhere() -> None:
    for name, page in PAGES.items():
        folder = ROOT if (ROOT / name).is_file() else ROOT / "docs"
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page):
            path, _, anchor = target.partition("#")
            linked = folder / path if path else folder / name
            assert linked.exists(), f"{name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{name}: {target}"


def test_commands_were_found() -> None:
    assert len(EVERY) > 50
