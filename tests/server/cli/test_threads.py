"""How many threads commands compute with."""

from __future__ import annotations

import os

import pytest

from memory.hardware import detect
from tests.server.harness import invoke


@pytest.mark.parametrize(("usable", "asked_for", "threads"), [(3, None, "3"), (8, None, None), (3, "5", "5")])
def test_threads_are_as_many_as_the_processor_time_of_a_container_is_for(
    monkeypatch: pytest.MonkeyPatch, usable: int, asked_for: str | None, threads: str | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked_for or "")
    if asked_for is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(detect, "allowed_cores", lambda: 8)
    monkeypatch.setattr(detect, "usable_cores", lambda: usable)

    assert invoke("--help").returncode == 0

    assert os.environ.get("OMP_NUM_THREADS") == threads
