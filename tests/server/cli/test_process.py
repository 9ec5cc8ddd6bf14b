"""A command as a process: signals, closed and broken streams, whatever it is doing when they come."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.server import harness
from tests.server.cli.terminals import Terminal
from tests.server.harness import ROOT, TINY

# As extension modules do that clear errors while they start.
SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass
except BaseException:
    pass
raise SystemExit("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["typer", "torch", "jinja2"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_modules_are_imported_is_never_swallowed(
    tmp_path: Path, module: str, name: str, code: int
) -> None:
    (tmp_path / f"{module}.py").write_text(SWALLOWS.format(name=name))

    result = harness.run("run", TINY, "Hello", PYTHONPATH=f"{tmp_path}:{ROOT}")

    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_after_the_work_is_done_changes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "jinja2.py").write_text(
        "import atexit, os, signal\n"
        f"atexit.register(os.kill, os.getpid(), signal.{name})\n"
        "raise ImportError('for this test')\n"
    )

    result = harness.run("run", TINY, "Hello", PYTHONPATH=f"{tmp_path}:{ROOT}")

    assert result.returncode == 1
    assert result.stderr.startswith("loci: for this test")


@pytest.mark.slow
def test_the_interpreter_is_not_taken_apart_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text(
        "import atexit, sys\n"
        "class Late:\n"
        "    def __del__(self, say=print, end=sys.stderr): say('taken apart', file=end)\n"
        "sys.late = Late()\n"
        "atexit.register(print, 'at exit', file=sys.stderr)\n"
        "raise ImportError('for this test')\n"
    )

    result = harness.run("run", TINY, "Hello", PYTHONPATH=f"{tmp_path}:{ROOT}")

    assert result.returncode == 1
    assert result.stderr.startswith("loci: for this test")
    assert result.stderr.endswith("\nat exit\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_model_answers_ends_without_a_word(number: signal.Signals, code: int) -> None:
    arguments = ("run", "smollm2", "Write a very long story about a river.", "--temperature", "0")
    with subprocess.Popen(
        harness.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=harness.environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(number)
        _, err = process.communicate(timeout=harness.DEADLINE_S)
    assert (process.returncode, err) == (code, b"")


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_ends_a_chat(tmp_path: Path) -> None:
    with Terminal("chat", TINY) as terminal:
        terminal.wait_for("\n> ")
        terminal.press(b"\x03")
        assert terminal.exit_code() == 130


def through_a_shell(redirection: str, *arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
    """Run `loci` with its streams redirected as a shell does: exit code, stdout, stderr."""
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *harness.command(*arguments)],
        input=stdin, capture_output=True, text=True, cwd=ROOT, env=harness.environment(),
        timeout=harness.DEADLINE_S, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


@pytest.mark.slow
def test_a_closed_stdin_is_one_that_holds_nothing() -> None:
    assert through_a_shell("<&-", "chat", TINY) == (0, "", "")
    assert through_a_shell("<&-", "run", TINY) == (1, "", "loci: the prompt is empty\n")


@pytest.mark.slow
def test_closed_outputs_are_no_reason_to_fail(tmp_path: Path) -> None:
    assert through_a_shell(">&-", "info", TINY, "--no-load") == (0, "", "")
    assert through_a_shell("2>&-", "info", tmp_path / "missing") == (1, "", "")
    code, out, err = through_a_shell("<&- 2>&-", "run", TINY, "Hello", "--max-tokens", "2")
    assert (code, err) == (0, "")
    assert out.endswith("\n")


@pytest.mark.slow
def test_a_pipe_that_is_closed_early_ends_without_a_word() -> None:
    commands: list[list[str | Path]] = [
        ["info", TINY, "--no-load"],
        ["run", TINY, "Hello", "--max-tokens", "500"],
    ]
    for arguments in commands:
        with subprocess.Popen(
            harness.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
            env=harness.environment(),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(harness.DEADLINE_S) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said_in_a_line() -> None:
    code, _, err = through_a_shell(">/dev/full", "info", TINY, "--no-load")

    assert code == 1
    assert err.startswith("loci: ")
    assert err.endswith("No space left on device\n")
    assert err.count("\n") == 1


def test_text_that_the_terminals_encoding_lacks_is_written_all_the_same() -> None:
    result = harness.run("demo", "Hi!", "--help", PYTHONIOENCODING="ascii")

    assert result.returncode == 0
    assert result.stderr == ""


def test_a_directory_that_was_removed_is_said_to_be(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    result = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *harness.command("info", TINY)],
        cwd=gone, env=harness.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert result.returncode == 1
    assert result.stderr == "loci: the current directory has been removed; change to another\n"
