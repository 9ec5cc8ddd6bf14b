"""Runs real clients against a scripted model, at two context lengths: a turn with a tool call, then another.

    python -m tests.clients.run [NAME ...]     # all, or some of tests/clients/scripts/ by name

A client that is not installed is reported as not tried: agents are found on PATH (or in --bin), packages
of Python in --python, those of npm in --node, the folder that has node_modules. It prints the table of
docs/clients.md.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.server.harness import LociServer

SCRIPTS = Path(__file__).parent / "scripts"
CONTEXTS = (32_768, 200_000)
KEY = "sk-scripted"
TIMEOUT_S = 180
MARK = "--- second turn"
PROLOGUE = f'second_turn() {{ echo; echo "{MARK}"; }}\nset -e\n'


@dataclass(frozen=True)
class Tools:
    """Where clients are installed."""

    bin: Path | None
    python: Path
    node: Path | None


class _Scripted(LociServer):
    """`loci serve` in front of the scripted model."""

    def __init__(self, directory: Path, context: int) -> None:
        self.out, self.err = directory / "stdout", directory / "stderr"
        self._lines = self.out.open("w"), self.err.open("w")
        flags = ["--port", "0", "--max-model-len", str(context), "--max-num-seqs", "4", "--api-key", KEY]
        names = ["--served-model-name", "scripted", "--any-model"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.clients.scripted_model", *flags, *names],
            stdout=self._lines[0],
            stderr=self._lines[1],
            stdin=subprocess.DEVNULL,
        )
        self.headers = {}
        self._url = ""


@contextmanager
def scripted_server(context: int) -> Iterator[LociServer]:
    """A server whose model follows the script, with a context of so many tokens."""
    with tempfile.TemporaryDirectory() as directory:
        server = _Scripted(Path(directory), context)
        try:
            yield server.await_ready()
        finally:
            server.kill()


def run_client(script: Path, url: str, tools: Tools) -> tuple[str, str]:
    """The client's version, and `works` or what went wrong."""
    with tempfile.TemporaryDirectory(prefix="loci-client-") as directory:
        home = Path(directory) / "home"
        work = Path(directory) / "work"
        home.mkdir()
        work.mkdir()
        word = f"word-{secrets.token_hex(4)}"
        note = work / "note.txt"
        note.write_text(f"{word}\n")
        variables = {
            "URL": url,
            "KEY": KEY,
            "HOME": str(home),
            "NOTE": str(note),
            "FIRST": f"Read the file {note} and say which word it has.",
            "SECOND": "Which word was it?",
            "PATH": os.pathsep.join([*([str(tools.bin)] if tools.bin else []), os.environ["PATH"]]),
        }
        try:
            code, said, complaint = _run_to_its_end(_command(script, tools), work, variables)
        except subprocess.TimeoutExpired:
            return "", f"did not end within {TIMEOUT_S} s"
        version = said.partition("\n")[0].strip()
        if code == 127 or "No module named" in complaint or "ERR_MODULE_NOT_FOUND" in complaint:
            return "", "not tried: not installed"
        first, mark, second = said.partition(MARK)
        missing = [name for name, turn in (("first", first), ("second", second)) if word not in turn]
        if not missing and mark:
            return version, "works"
        last = (complaint.strip() or said.strip()).splitlines()[-1:] or ["nothing was said"]
        return version, f"fails in the {' and '.join(missing)} turn: {last[0][:120]}"


def _run_to_its_end(command: list[str], work: Path, variables: dict[str, str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command, which leaves no process behind."""
    process = subprocess.Popen(
        command,
        cwd=work,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, complaint = process.communicate(timeout=TIMEOUT_S)
    finally:
        # Agents start servers and shells of their own, which outlive them where they are stopped.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, said, complaint


def _command(script: Path, tools: Tools) -> list[str]:
    if script.suffix == ".py":
        return [str(tools.python), str(script)]
    if script.suffix == ".mjs":
        # Modules are looked for where the script lies.
        beside = script
        if tools.node is not None:
            beside = tools.node / script.name
            beside.write_text(script.read_text())
        return ["node", str(beside)]
    return ["bash", "-c", PROLOGUE + script.read_text()]


def main() -> None:
    """Print a row for each client."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--bin", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--node", type=Path)
    parser.add_argument("--context", type=int, action="append", help="instead of both lengths")
    given = parser.parse_args()
    tools = Tools(given.bin, given.python, given.node)
    scripts = [s for s in sorted(SCRIPTS.iterdir()) if not given.names or s.stem in given.names]
    results: dict[str, list[tuple[str, str]]] = {script.stem: [] for script in scripts}
    contexts = given.context or CONTEXTS
    for context in contexts:
        with scripted_server(context) as server:
            for script in scripts:
                results[script.stem].append(run_client(script, server.url, tools))
                print(f"{context} {script.stem}: {results[script.stem][-1]}", file=sys.stderr)
    print(f"| client | version | {' | '.join(f'context {context:,}' for context in contexts)} |")
    print(f"|---|---|{'---|' * len(contexts)}")
    for name, rows in results.items():
        version = next((version for version, _ in rows if version), "")
        print(f"| {name} | {version} | {' | '.join(told for _, told in rows)} |")


if __name__ == "__main__":
    main()
