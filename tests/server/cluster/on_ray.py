"""A `loci serve --cluster` and Ray's processes below it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.server.harness import command, environment

START_S = 240.0
BODY = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 3}


class Served:
    """A `loci serve` on a free port, and its processes."""

    def __init__(self, folder: Path, model: Path, *flags: str | Path) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command("serve", model, "--port", "0", *flags),
                stdout=log,
                stderr=log,
                env=environment(),
            )
        self.url = self._wait()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _wait(self) -> str:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            text = self.log.read_text()
            if "is ready" in text:
                return text.split("Loci listens on ")[1].split()[0]
            assert self.process.poll() is None, text
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def complete(self, **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.post("/v1/completions", json=BODY | more).json()
        return answer

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self, name: str) -> list[psutil.Process]:
        """Of Ray's processes, those that are named so after what they run."""
        return [p for p in self.processes() if p.status() != "zombie" and name in " ".join(p.cmdline())]

    def stop(self) -> None:
        started = self.processes()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            _, left = psutil.wait_procs(started, timeout=15)
            for process in left:
                process.kill()
        assert not left


def check_loopback_only(pid: int) -> None:
    """Nothing of a process and those below it listens beyond this machine."""
    started = psutil.Process(pid)
    for process in [started, *started.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (
                    process.name(),
                    connection,
                )


def answered(completion: dict[str, Any]) -> object:
    """What was said, with its log probabilities."""
    return completion["choices"][0]["text"], completion["choices"][0]["logprobs"]
