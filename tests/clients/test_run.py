"""The runner of clients ends whatever a client has started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients import run
from tests.clients.run import Tools, run_client
from tests.server.harness import eventually


def alive(pid: int) -> bool:
    """Whether a process runs; those that nobody waited for do not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_client_that_is_stopped_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, started = tmp_path / "agent.sh", tmp_path / "pid"
    script.write_text(f"sleep 600 & echo $! > {started}; wait")
    monkeypatch.setattr(run, "TIMEOUT_S", 2)

    told = run_client(script, "http://127.0.0.1:1", Tools(None, Path("python"), None))

    assert told == ("", "did not end within 2 s")
    eventually(lambda: not alive(int(started.read_text())), "the agent's own process has ended", 10)
