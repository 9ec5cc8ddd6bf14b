"""Two parts of a model in Ray's processes: the same answers as in one, nothing hangs when one is killed, and
nothing listens beyond this machine."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import golden_path
from tests.engine.families.golden_families import golden_family
from tests.server.cluster.on_ray import BODY, Served, answered, check_loopback_only
from tests.server.harness import complaint, run

pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
pytestmark = pytest.mark.slow

LIMITS = (
    "--dram-budget", "150MiB", "--max-model-len", "400", "--max-num-seqs", "8", "--prefix-cache", "20MiB"
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture(scope="module")
def staged(folder: Path) -> Iterator[Served]:
    served = Served(folder, golden_path("v41-a"), *LIMITS, "--cluster", "local", "--stages", "2")
    yield served
    served.stop()


def test_two_stages_answer_as_one_process_does(staged: Served, folder: Path) -> None:
    alone = Served(folder, golden_path("v41-a"), *LIMITS)
    try:
        prompts = [BODY["prompt"], "A long one: " + "and then there was more of it, " * 20, "x"]
        expected = [answered(alone.complete(prompt=prompt)) for prompt in prompts]
    finally:
        alone.stop()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda prompt: answered(staged.complete(prompt=prompt)), prompts)) == expected
    again = staged.complete(prompt=prompts[1])
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # in the stages' own memory
    assert answered(again) == expected[1]


def test_nothing_listens_beyond_this_machine(staged: Served) -> None:
    check_loopback_only(staged.process.pid)


def test_the_hops_are_metrics(staged: Served) -> None:
    staged.complete()
    metrics = staged.client.get("/metrics").text
    for name in ("loci_stage_seconds_total", "loci_stage_bytes_total"):
        for stage in ("0", "1"):
            assert f'{name}{{stage="{stage}"}}' in metrics
    assert "loci_stages_up 1.0" in metrics


def test_a_killed_stage_hangs_nobody_and_comes_back(staged: Served) -> None:
    before = answered(staged.complete())
    first, second = staged.workers("_Actor")
    ended: list[str] = []

    def stream(number: int) -> None:
        body = BODY | {"prompt": f"Story {number}", "max_tokens": 300, "stream": True}
        with staged.client.stream("POST", "/v1/completions", json=body) as answer:
            ended.append("".join(answer.iter_lines()))

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    os.kill(second.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(90)
    assert len(ended) == 32  # each has an end of its stream, or an error
    end = time.monotonic() + 90
    while "error" in (answer := staged.complete()):
        assert "again" in answer["error"]["message"]
        assert time.monotonic() < end
        time.sleep(0.5)
    assert answered(answer) == before
    assert first.is_running()
    page = staged.client.get("/metrics").text
    assert re.findall(r"^loci_stages_lost_total .*", page, re.MULTILINE) == ["loci_stages_lost_total 1.0"]


def test_what_cannot_be_is_said_before_anything_is_loaded() -> None:
    model = golden_family("deepseek_v4").path
    refused = run("serve", model, "--cluster", "local", "--port", "0")
    assert "runs on one machine only" in complaint(refused.stderr)
    refused = run("serve", golden_path("v41-a"), "--stages", "2", "--port", "0")
    assert "give --cluster too" in complaint(refused.stderr)
