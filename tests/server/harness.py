"""Real `loci` processes for tests: started on a free port, awaited, always ended."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.cli.main import main

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "v41-c"  # random weights; answers are noise, but real ones
DEADLINE_S = 90.0

# One thread is plenty for the tiny model and leaves the machine to others.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def command(*arguments: str | Path) -> list[str]:
    """The command line of `loci` with these arguments."""
    return [sys.executable, "-P", "-m", "server", *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without its own LOCI_ variables, and with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOCI_")}
    return kept | _ENVIRONMENT | variables


def run(
    *arguments: str | Path, stdin: str = "", cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `loci` to its end."""
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=cwd,
        env=environment(**variables),
        check=False,
    )


def complaint(stderr: str) -> str:
    """What a failed `loci` said last, behind the lines of its log."""
    return stderr[stderr.index("loci: ") :]


def invoke(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `loci` inside this process, which spares loading torch once more."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["loci", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
    if isinstance(code, str):  # as the interpreter does with a message
        err.write(f"{code}\n")
        code = 1
    return subprocess.CompletedProcess(arguments, int(str(code)), out.getvalue(), err.getvalue())


def eventually(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until `condition` holds; fail naming `what` if it does not in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.02)


class LociServer:
    """A `loci serve` process; `out` and `err` are files with what it printed."""

    def __init__(self, directory: Path, arguments: Sequence[str | Path] = (TINY,), **variables: str) -> None:
        self.out = directory / "stdout"
        self.err = directory / "stderr"
        self._lines = self.out.open("w"), self.err.open("w")
        self.process = subprocess.Popen(
            command("serve", *arguments, "--port", "0"),
            stdout=self._lines[0],
            stderr=self._lines[1],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment(**variables),
        )
        self.headers: dict[str, str] = {}  # what its metrics want, where it has keys
        self._url = ""

    @property
    def url(self) -> str:
        """Where it listens, as it printed it."""
        if not self._url:
            eventually(lambda: self._found_url() or self.process.poll() is not None, "the URL is printed")
            assert self._url, f"the server ended: {self.err.read_text()}"
        return self._url

    def await_ready(self) -> LociServer:
        """Return once the model is loaded."""
        eventually(lambda: self._is_ready() or self.process.poll() is not None, "the model is loaded")
        assert self.process.poll() is None, f"the server ended: {self.err.read_text()}"
        return self

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name: str, **labels: str) -> float:
        """The sample of this name with (at least) these labels; 0 where there is none."""
        page = httpx.get(f"{self.url}/metrics", headers=self.headers).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def exit_code(self) -> int:
        """Wait for the end."""
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """End it whatever it does."""
        self.process.kill()
        self.process.wait()
        for file in self._lines:
            file.close()

    def _found_url(self) -> bool:
        found = re.search(r"listens on .*?(http://[^\s)]+)", self.out.read_text())
        self._url = found.group(1) if found else ""
        return bool(found)
