"""`loci demo` answers while experts and Engram rows move, and says where they were."""

from __future__ import annotations

import re

import pytest

from tests.server import harness

pytestmark = pytest.mark.slow


def test_the_demo_shows_what_served_an_answer() -> None:
    result = harness.run("demo", "What does a cow eat?")

    assert result.returncode == 0, result.stderr
    assert "grass" in result.stdout
    rows = {
        tier: (int(experts), int(share), rest.split())
        for tier, experts, share, rest in re.findall(
            r"^(GPU \d|DRAM|disk) +(\d+) +(\d+)% (.*)$", result.stdout, re.MULTILINE
        )
    }
    assert rows.keys() == {"GPU 0", "GPU 1", "DRAM", "disk"}
    assert sum(experts for experts, _, _ in rows.values()) == 144
    assert all(share > 0 for _, share, _ in rows.values())
    for gpu in ("GPU 0", "GPU 1"):  # experts came to it, and others went
        left, moved, *_ = rows[gpu][2]
        assert int(left) > 0
        assert float(moved) > 0
    assert float(rows["disk"][2][0]) > 0
    assert re.search(r"[1-9][\d,]* read from disk", result.stdout)


def test_the_demo_takes_questions_from_a_pipe() -> None:
    result = harness.run("demo", stdin="Hello!\n\nWho are you?\n")

    assert result.returncode == 0, result.stderr
    assert "> Hello!" in result.stdout
    assert "> Who are you?" in result.stdout


def test_a_budget_that_is_too_small_is_one_line() -> None:
    result = harness.run("demo", "Hello!", "--dram-budget", "1MB")

    assert result.returncode == 1
    assert harness.complaint(result.stderr).count("\n") == 1
