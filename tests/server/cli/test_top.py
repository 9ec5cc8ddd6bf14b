"""`loci top` shows what a running server's metrics say."""

from __future__ import annotations

import re
import urllib.request

import pytest
from rich.console import Console

from server.cli.top import Sample, view
from tests.server.cli.terminals import ESCAPE, LIVELY, Terminal
from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer, complaint, invoke

PAGE = """# TYPE loci_time_to_first_token_seconds histogram
loci_time_to_first_token_seconds_bucket{le="0.1"} 2
loci_time_to_first_token_seconds_bucket{le="0.5"} 10
loci_time_to_first_token_seconds_bucket{le="+Inf"} 10
"""
LINKS = """# TYPE loci_link_bytes counter
loci_link_bytes_total{{link="nvme"}} {moved}
# TYPE loci_link_busy_seconds counter
loci_link_busy_seconds_total{{link="nvme"}} {busy}
# TYPE loci_stall_seconds counter
loci_stall_seconds_total{{link="nvme",reason="demand"}} {demand}
loci_stall_seconds_total{{link="nvme",reason="another"}} {another}
# TYPE loci_prefix_cache_queries counter
loci_prefix_cache_queries_total {queries}
# TYPE loci_prefix_cache_hits counter
loci_prefix_cache_hits_total {hits}
# TYPE loci_prefix_cache_budget_bytes gauge
loci_prefix_cache_budget_bytes 1000
"""
ENDED = "\x1b[?1049l"  # a terminal leaves the screen that a live view had for itself


def ask(server: LociServer) -> None:
    body = b'{"model": "%s", "prompt": "A test", "max_tokens": 4, "ignore_eos": true}' % TINY.name.encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).read()


def watching(server: LociServer, **variables: str) -> Terminal:
    return Terminal("top", "--url", server.url, "--interval", "0.2", **variables)


def shown(now: Sample, before: Sample | None = None, earlier: Sample | None = None) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(view(now, before, earlier))
    return captured.get()


@pytest.mark.slow
def test_one_look_at_a_server_shows_its_tiers_links_and_rows(start_server: StartServer) -> None:
    server = start_server(TINY, "--dram-budget", "1.34MB", "--devices", "virtual:64KB@100MB/s").await_ready()
    ask(server)
    once = invoke("top", "--once", "--url", server.url)
    assert once.returncode == 0
    for words in (
        ("running", "in the queue", "first token", "between tokens", "whole answer"),
        ("KV", "prefixes", "prefix hits"),
        ("vram:0", "nvme (misses)", "busy", "waited: demand"),
        ("routing predictions", "Engram rows", "asked"),
    ):
        for word in words:
            assert word in once.stdout
    assert max(map(len, once.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_the_live_view_follows_a_server_until_ctrl_c(start_server: StartServer) -> None:
    server = start_server(TINY).await_ready()
    with watching(server, **LIVELY) as terminal:
        assert "latency" not in terminal.wait_for("answer tokens/s")
        ask(server)
        assert "in the queue" in terminal.wait_for("between tokens")
        terminal.press(b"\x03")
        terminal.wait_for(re.escape(ENDED))
        assert terminal.exit_code() == 0


@pytest.mark.slow
def test_q_ends_the_live_view_and_other_keys_do_not(server: LociServer) -> None:
    with watching(server, **LIVELY) as terminal:
        terminal.wait_for("answer tokens/s")
        terminal.press(b"x?")
        terminal.wait_for("answer tokens/s")
        terminal.press(b"q")
        terminal.wait_for(re.escape(ENDED))
        assert terminal.exit_code() == 0


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"TERM": "dumb", "NO_COLOR": ""}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_a_plain_terminal_gets_one_view_below_the_other(
    server: LociServer, variables: dict[str, str]
) -> None:
    with watching(server, **variables) as terminal:
        drawn = terminal.wait_for("answer tokens .*\n(.*\n)*.*answer tokens/s")
        assert "memory" in drawn
        terminal.press(b"q")
        drawn += terminal.rest()
        assert terminal.exit_code() == 0
        assert ESCAPE not in drawn


@pytest.mark.slow
def test_a_server_that_vanishes_ends_the_live_view_with_one_line(start_server: StartServer) -> None:
    server = start_server(TINY).await_ready()
    with watching(server, **LIVELY) as terminal:
        terminal.wait_for("answer tokens/s")
        server.kill()
        terminal.wait_for(re.escape(ENDED) + r"\S*\s*loci: http://\S+: no server is answering \(.*\n")
        assert terminal.exit_code() == 1


def test_no_server_there_is_said_in_one_line() -> None:
    once = invoke("top", "--once", "--url", "http://127.0.0.1:1", "--api-key", "schlüssel")
    assert once.returncode == 1
    assert "no server is answering" in complaint(once.stderr)


def test_percentiles_lie_within_their_buckets() -> None:
    sample = Sample(PAGE, 0.0)
    name = "loci_time_to_first_token_seconds"
    assert sample.quantile(name, 0.5, None) == 0.1 + 0.4 * 3 / 8
    assert sample.quantile(name, 0.2, None) == 0.1
    assert sample.quantile(name, 0.5, sample) is None


def test_shares_are_those_of_the_time_between_two_looks() -> None:
    before = Sample(LINKS.format(moved=0, busy=1.0, demand=1.0, another=0.0, queries=10, hits=0), 10.0)
    now = Sample(LINKS.format(moved=4e6, busy=2.5, demand=1.5, another=0.2, queries=14, hits=3), 12.0)
    text = shown(now, before, before)
    for expected in ("2 MB", "75.0%", "25.0%", "waited: another", "10.0%"):
        assert expected in text
    assert "75%" in text  # prefix hits: 3 of 4
    assert "2.50 s" in shown(now)


def test_what_a_server_does_not_have_is_left_out() -> None:
    text = shown(Sample("loci_process_resident_memory_bytes 1e9\n", 0.0))
    assert "requests" in text
    for section in ("latency", "cache", "tier", "link", "since start"):
        assert section not in text
