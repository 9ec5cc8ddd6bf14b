"""Servers of one's own, for commands that measure them: started on a free port, ended with their user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from quant.errors import LociError

READY_TIMEOUT_S = 600
END_TIMEOUT_S = 60


@contextmanager
def serving(*arguments: str, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """The URL of a new `loci serve` with these arguments, once it is ready. Raises LociError where it fails.

    variables  of its environment, beside those of this process
    """
    command = "server", "serve", *arguments, "--port", "0"
    with child_server(*command, ready="/ready", environment={**os.environ, **(variables or {})}) as url:
        yield url


@contextmanager
def child_server(module: str, *arguments: str, ready: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run one of Loci's modules that serves and prints "listens on URL"; the URL, once it is ready.

    ready  the path that answers 200 as soon as it is

    Raises LociError where it fails.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        err = Path(folder) / "err"
        # Not the caller's directory, which may hold a server.py: hence -P. An empty entry means it too.
        path = [
            str(Path(__file__).resolve().parents[2]),
            *environment.get("PYTHONPATH", "").split(os.pathsep),
        ]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            )
        try:
            yield _when_ready(process, out, err, ready)
        finally:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _when_ready(process: subprocess.Popen[bytes], out: Path, err: Path, ready: str) -> str:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LociError(f"the server ended: {err.read_text().strip()}")
        found = re.search(r"listens on .*?(http://[^\s)]+)[\s)]", out.read_text())
        if found and _is_ready(found.group(1) + ready):
            return found.group(1)
        time.sleep(0.05)
    raise LociError(f"the server was not ready within {READY_TIMEOUT_S} s: {err.read_text().strip()}")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
