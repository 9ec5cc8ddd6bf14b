"""Servers on a Ray that was there before and goes on after them: each has its own replicas, or none."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.server.cluster.on_ray import BODY, Served
from tests.server.harness import TINY, command, complaint, environment, eventually

pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
pytestmark = pytest.mark.slow

LIMITS = ("--dram-budget", "150MiB", "--max-model-len", "2048", "--max-num-seqs", "4", "--replicas", "1")
# Half a minute when nothing else runs, for replicas that are tried three times.
ENDS_S = 240.0
# What docs/cluster.md says about applications that are left.
DELETE = "from ray import serve; serve.delete('loci')"


@dataclass(frozen=True)
class Lasting:
    """A Ray that is not the servers' own."""

    address: str
    process: psutil.Process

    @property
    def has_replicas(self) -> bool:
        """Whether a server has replicas on it."""
        below = self.process.children(recursive=True)
        alive = [each for each in below if each.status() != psutil.STATUS_ZOMBIE]
        return any("replica" in " ".join(each.cmdline()) for each in alive)


@pytest.fixture(scope="module")
def ray() -> Iterator[Lasting]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    token = secrets.token_hex(32)
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_memory_monitor_refresh_ms": "0"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    with tempfile.TemporaryDirectory(prefix="r") as folder, pytest.MonkeyPatch.context() as patched:
        for name, value in given.items():
            patched.setenv(name, value)
        flags = (
            "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
            "--num-cpus=4", "--object-store-memory=100000000", f"--temp-dir={folder}",
        )  # fmt: skip
        log = Path(folder) / "log"
        with log.open("w") as out:
            process = subprocess.Popen([*start, *flags], stdout=out, stderr=out, env=environment(**given))
        try:
            eventually(lambda: "Ray runtime started" in log.read_text(), log.read_text(), ENDS_S)
            yield Lasting(f"127.0.0.1:{port}", psutil.Process(process.pid))
        finally:
            started = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for each in started:
                each.kill()
            psutil.wait_procs(started, timeout=15)


@pytest.fixture
def serve(ray: Lasting, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers on that Ray."""
    started: list[Served] = []

    def start(*flags: str) -> Served:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Served(folder, TINY, *LIMITS, "--cluster", ray.address, *flags))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()


def refused(ray: Lasting, *flags: str) -> str:
    """Why a server does not start."""
    line = command("serve", TINY, *LIMITS, "--cluster", ray.address, "--port", "0", *flags)
    ended = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=ENDS_S)
    return complaint(ended.stderr)


def test_a_second_server_leaves_the_replicas_of_the_first_alone(
    serve: Callable[..., Served], ray: Lasting
) -> None:
    first = serve("--drain-timeout-s", "1")
    assert "runs an application named loci already" in refused(ray)
    assert "choices" in first.complete()
    # What still runs when draining is over is ended, and the replicas are gone before the server is.
    body = BODY | {"max_tokens": 1900, "stream": True, "logprobs": None}
    with first.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(ENDS_S) == 0
    eventually(lambda: not ray.has_replicas, "its replicas are gone")


def test_a_server_that_is_stopped_while_it_loads_leaves_no_replicas(ray: Lasting, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        flags = (*LIMITS, "--cluster", ray.address, "--port", "0")
        process = subprocess.Popen(command("serve", TINY, *flags), stdout=out, stderr=out, env=environment())
    try:
        eventually(lambda: ray.has_replicas, "a replica is being started", ENDS_S)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.wait(ENDS_S)
    finally:
        process.kill()
    eventually(lambda: not ray.has_replicas, "it is taken away", ENDS_S)


def test_replicas_that_cannot_be_loaded_are_not_left_to_be_tried_again(ray: Lasting) -> None:
    assert "the replicas cannot be started: " in refused(ray, "--dram-budget", "1MiB")
    left = "from ray import serve; print(list(serve.status().applications))"
    found = subprocess.run(
        [sys.executable, "-c", left],
        capture_output=True,
        env=environment(RAY_ADDRESS=ray.address),
        text=True,
        timeout=ENDS_S,
    )
    assert found.stdout.splitlines()[-1] == "[]"


def test_replicas_of_a_server_that_was_killed_can_be_ended(
    serve: Callable[..., Served], ray: Lasting
) -> None:
    killed = serve()
    killed.process.kill()
    killed.process.wait()
    assert ray.has_replicas
    ended = subprocess.run(
        [sys.executable, "-c", DELETE], env=environment(RAY_ADDRESS=ray.address), timeout=ENDS_S, check=True
    )
    assert ended.returncode == 0
    assert DELETE in (Path(__file__).parents[3] / "docs" / "cluster.md").read_text()
    eventually(lambda: not ray.has_replicas, "they are gone", ENDS_S)
