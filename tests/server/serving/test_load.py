"""Sixty clients at once, some of which leave without a word: nothing is lost, nothing is left behind."""

from __future__ import annotations

import asyncio

import pytest

from tests.bench.load import run_load
from tests.server.conftest import StartServer
from tests.server.harness import TINY

pytestmark = pytest.mark.slow


def test_a_crowd_with_random_disconnects_leaves_nothing_behind(start_server: StartServer) -> None:
    server = start_server(TINY, "--max-num-seqs", "8", "--max-waiting", "32").await_ready()

    tally = asyncio.run(run_load(server, "v41-c", clients=60, seconds=4))

    assert tally.problems == []
    assert len(tally.complete) > 8
    assert tally.left > 5
    assert tally.refused > 0
    assert "Traceback" not in server.err.read_text()
