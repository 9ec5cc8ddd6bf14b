"""A `loci serve` of one's own, for commands that measure it: started on a free port, ended with its user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from quant.errors import LociError

READY_TIMEOUT_S = 600
END_TIMEOUT_S = 60


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """The URL of a new server with these arguments, once it is ready. Raises LociError where it fails."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        err = Path(folder) / "err"
        # Not the caller's directory, which may hold a server.py: hence -P. An empty entry means it too.
        path = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "server", "serve", *arguments, "--port", "0"],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            )
        try:
            yield _when_ready(process, out, err)
        finally:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _when_ready(process: subprocess.Popen[bytes], out: Path, err: Path) -> str:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LociError(f"the server ended: {err.read_text().strip()}")
        found = re.search(r"listens on .*?(http://[^\s)]+)[\s)]", out.read_text())
        if found and _is_ready(found.group(1)):
            return found.group(1)
        time.sleep(0.05)
    raise LociError(f"the server was not ready within {READY_TIMEOUT_S} s: {err.read_text().strip()}")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False
