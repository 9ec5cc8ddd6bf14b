"""A server with budgets says what is where, and what moved."""

from __future__ import annotations

import openai
import pytest

from tests.server.conftest import StartServer
from tests.server.harness import TINY, complaint

pytestmark = pytest.mark.slow


def greedy(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        answer = sdk.completions.create(
            model=TINY.name,
            prompt="A test of tiers",
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    return answer.choices[0].text


def test_experts_on_virtual_gpus_in_dram_and_on_disk_answer_alike_and_are_counted(
    start_server: StartServer,
) -> None:
    devices = "virtual:64KB@100MB/s,virtual:64KB@100MB/s"
    small = start_server(TINY, "--dram-budget", "1.34MB", "--devices", devices).await_ready()
    large = start_server(TINY).await_ready()
    assert greedy(small.url) == greedy(large.url)

    hits = {
        tier: small.metric("loci_expert_hits_total", tier=tier)
        for tier in ("vram:0", "vram:1", "dram", "nvme")
    }
    assert hits["vram:0"] + hits["vram:1"] > 0
    assert hits["nvme"] > 0
    assert sum(hits.values()) == small.metric("loci_experts_computed_total")
    assert small.metric("loci_link_bytes_total", link="nvme") > 0
    assert small.metric("loci_stall_seconds_total") > 0
    assert small.metric("loci_engram_rows_total", rows="asked") > 0
    assert 0 < small.metric("loci_tier_memory_bytes", tier="vram:1", content="weights") <= 64_000
    assert 0 < small.metric("loci_tier_memory_bytes", tier="dram", content="weights") <= 1_600_000
    assert large.metric("loci_expert_hits_total", tier="nvme") == 0


def test_a_budget_that_cannot_hold_the_dense_weights_ends_with_one_line(start_server: StartServer) -> None:
    server = start_server(TINY, "--dram-budget", "100KB")
    assert server.exit_code() == 1
    assert "the weights used by every token need" in complaint(server.err.read_text())


def test_gpus_that_are_not_there_are_refused(start_server: StartServer) -> None:
    server = start_server(TINY, "--devices", "cuda:20GiB")
    assert server.exit_code() == 1
    assert "there is no CUDA GPU 0" in complaint(server.err.read_text())
