"""What a terminal is sent: drawings where it can show them, plain text where it cannot or NO_COLOR is set."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.server import harness
from tests.server.cli.terminals import ESCAPE, LIVELY, Terminal
from tests.server.harness import TINY, LociServer

PLAIN = [
    {"TERM": "dumb", "NO_COLOR": ""},
    {"TERM": "xterm-256color", "NO_COLOR": "1"},
    {"TERM": "", "NO_COLOR": ""},
]
COMMANDS = [
    ("--help",),
    ("serve", "--wrong"),
    ("info", TINY, "--no-load"),
    ("demo", "Hello! How are you?"),
    ("plan", TINY),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS)
@pytest.mark.parametrize("variables", PLAIN)
def test_a_plain_terminal_is_sent_no_escape_sequences(
    arguments: tuple[str | Path, ...], variables: dict[str, str]
) -> None:
    with Terminal(*arguments, **variables) as terminal:
        drawn = terminal.rest()
    assert drawn.strip()
    assert ESCAPE not in drawn


@pytest.mark.slow
@pytest.mark.parametrize("variables", PLAIN)
def test_a_chat_in_a_plain_terminal_has_no_escape_sequences(variables: dict[str, str]) -> None:
    with Terminal("chat", TINY, "--max-tokens", "6", **variables) as terminal:
        drawn = terminal.wait_for("\n> ")
        terminal.press(b"Hello\n")
        drawn += terminal.wait_for("\n> ")
        terminal.press(b"/quit\n")
        drawn += terminal.rest()
        assert terminal.exit_code() == 0
    assert ESCAPE not in drawn


def test_a_lively_terminal_is_drawn_to() -> None:
    with Terminal("--help", **LIVELY) as terminal:
        assert ESCAPE in terminal.rest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "pasted"),
    [
        (LIVELY, b"\x1b[200~one\ntwo\n\nthree\x1b[201~\r"),
        (LIVELY, b"one\ntwo\n\nthree\n"),
        (PLAIN[0], b"one\ntwo\n\nthree\n"),
    ],
)
def test_pasted_lines_are_one_message(server: LociServer, variables: dict[str, str], pasted: bytes) -> None:
    message = {"role": "user", "content": "one\ntwo\n\nthree"}
    body = {"model": TINY.name, "messages": [message], "max_tokens": 2}
    asked = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    before = prompt_tokens(server)

    with Terminal("chat", "--url", server.url, "--max-tokens", "2", **variables) as terminal:
        terminal.wait_for("> $|> \x1b[^\n]*$")
        terminal.press(pasted)
        terminal.wait_for("three")
        terminal.wait_for("\n(\x1b\\S*)*> ")
        terminal.press(b"/quit\n")
        assert terminal.exit_code() == 0

    assert prompt_tokens(server) == before + asked["usage"]["prompt_tokens"]


def prompt_tokens(server: LociServer) -> float:
    """Of all prompts, computed or found in the cache."""
    return sum(server.metric(f"loci_{what}_tokens_total") for what in ("prompt", "prefix_cache"))


def test_a_command_among_waiting_lines_is_obeyed(server: LociServer) -> None:
    with Terminal("chat", "--url", server.url, "--max-tokens", "2", **PLAIN[0]) as terminal:
        terminal.wait_for("\n> ")
        terminal.press(b"one\n/quit\n")
        assert terminal.exit_code() == 0


@pytest.mark.slow
def test_a_prompt_comes_through_a_pipe() -> None:
    flags = ("--max-tokens", "4", "--temperature", "0")
    given = harness.invoke("run", TINY, "Hello", *flags)

    assert harness.run("run", TINY, *flags, stdin="Hello").stdout == given.stdout
    assert harness.run("run", TINY, "-", *flags, stdin="Hello").stdout == given.stdout


def test_a_prompt_that_is_missing_is_asked_for() -> None:
    with Terminal("run", TINY, **PLAIN[0]) as terminal:
        assert "pipe one in" in " ".join(terminal.rest().split())
        assert terminal.exit_code() == 2


def test_help_and_version_have_the_usual_names() -> None:
    assert harness.invoke("--version").stdout.startswith("loci ")
    for arguments in ((), ("serve",), ("bench",), ("bench", "slice")):
        short, long = (harness.invoke(*arguments, flag) for flag in ("-h", "--help"))
        assert short.returncode == 0
        assert short.stdout == long.stdout
    assert "--install-completion" in harness.invoke("-h").stdout
