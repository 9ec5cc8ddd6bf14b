"""`loci top` shows what a running server's metrics say."""

from __future__ import annotations

import urllib.request

from server.cli_top import Sample
from tests.server.conftest import StartServer
from tests.server.harness import TINY, complaint, invoke

PAGE = """# TYPE loci_time_to_first_token_seconds histogram
loci_time_to_first_token_seconds_bucket{le="0.1"} 2
loci_time_to_first_token_seconds_bucket{le="0.5"} 10
loci_time_to_first_token_seconds_bucket{le="+Inf"} 10
"""


def test_one_look_at_a_server_shows_its_tiers_links_and_rows(start_server: StartServer) -> None:
    server = start_server(TINY, "--dram-budget", "1.6MB", "--devices", "virtual:64KB@100MB/s").await_ready()
    body = b'{"model": "%s", "prompt": "A test", "max_tokens": 4}' % TINY.name.encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).read()
    shown = invoke("top", "--once", "--url", server.url)
    assert shown.returncode == 0
    for word in ("running", "first token", "vram:0", "nvme (misses)", "Engram rows", "asked"):
        assert word in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_no_server_there_is_said_in_one_line() -> None:
    shown = invoke("top", "--once", "--url", "http://127.0.0.1:1")
    assert shown.returncode == 1
    assert "no server answers there" in complaint(shown.stderr)


def test_percentiles_lie_within_their_buckets() -> None:
    sample = Sample(PAGE, 0.0)
    name = "loci_time_to_first_token_seconds"
    assert sample.quantile(name, 0.5, None) == 0.1 + 0.4 * 3 / 8
    assert sample.quantile(name, 0.2, None) == 0.1
    assert sample.quantile(name, 0.5, sample) is None
