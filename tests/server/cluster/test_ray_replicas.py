"""Two replicas behind one server, in Ray's processes: as one server to clients, whichever of them dies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.cluster.on_ray import BODY, Served, answered, check_loopback_only
from tests.server.harness import TINY, LociServer, complaint, eventually, run

pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
pytestmark = pytest.mark.slow

LIMITS = (
    "--dram-budget",
    "150MiB",
    "--max-model-len",
    "2048",
    "--max-num-seqs",
    "16",
    "--prefix-cache",
    "20MiB",
)
KEYS = """
free = "sk-free"

[bounded]
key = "sk-bounded"
requests_per_minute = 2
"""
BACK_S = 150.0


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("r")
    keys = folder / "keys.toml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    flags = ("--cluster", "local", "--replicas", "2", "--api-key-file", keys)
    served = Served(folder, TINY, *LIMITS, *flags)
    served.client.headers["Authorization"] = "Bearer sk-free"
    yield served
    served.stop()


def metric(served: Served, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    page = served.client.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def processes_of(served: Served) -> list[psutil.Process]:
    return served.workers("replica")


def texts(served: Served, count: int, tokens: int, on_event: Callable[[], None] = lambda: None) -> list[str]:
    """What as many streams say, all at the same time; an error stands in its text."""

    def stream(number: int) -> str:
        body = BODY | {"prompt": f"Story {number}", "max_tokens": tokens, "stream": True, "logprobs": None}
        said = ""
        with served.client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    said += str(event["error"]) if "error" in event else event["choices"][0]["text"]
                    on_event()
        return said

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(stream, range(count)))


def test_replicas_answer_as_one_server_does(replicas: Served, server: LociServer) -> None:
    prompts = [BODY["prompt"], "A long one: " + "and then there was more of it, " * 9, "x"]
    alone = httpx.Client(base_url=server.url, timeout=60)
    expected = [answered(alone.post("/v1/completions", json=BODY | {"prompt": p}).json()) for p in prompts]
    for _ in range(2):  # from each of them, and from what they keep
        with ThreadPoolExecutor(3) as pool:
            asked = pool.map(lambda prompt: answered(replicas.complete(prompt=prompt)), prompts)
            assert list(asked) == expected


def test_a_conversation_goes_on_where_its_prefix_is(replicas: Served) -> None:
    before = metric(replicas, "loci_replica_sequences_total", by="prefix")
    said = [f"Tell me of number {number}, at some length please. " * 4 for number in range(4)]
    known = [0] * len(said)
    for _ in range(3):
        for number, text in enumerate(said):
            answer = replicas.complete(prompt=text, max_tokens=40, logprobs=None)
            usage = answer["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= known[number]
            known[number] = usage["prompt_tokens"] - 16  # an answer of noise is cut into other tokens again
            said[number] = text + answer["choices"][0]["text"] + " And then, what came of it? "
    assert metric(replicas, "loci_replica_sequences_total", by="prefix") - before == 2 * len(said)
    assert metric(replicas, "loci_replica_prefix_tokens_total") > 0


def test_nothing_listens_beyond_this_machine(replicas: Served) -> None:
    check_loopback_only(replicas.process.pid)


def test_keys_limits_and_ids_are_those_of_one_server(replicas: Served) -> None:
    url = f"{replicas.url}/v1/completions"
    assert httpx.post(url, json=BODY).status_code == 401
    bounded = {"Authorization": "Bearer sk-bounded", "X-Request-Id": "mine"}
    answers = [httpx.post(url, json=BODY, headers=bounded, timeout=60) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert {answer.headers["x-request-id"] for answer in answers} == {"mine"}
    refused = replicas.complete(prompt="x " * 4000)
    assert refused["error"]["code"] == "context_length_exceeded"
    wrong = replicas.client.post("/v1/completions", json=BODY | {"logprobs": None, "temperature": 99})
    assert wrong.status_code == 400


def test_a_structured_answer_is_bound_by_its_grammar(replicas: Served) -> None:
    body = {"prompt": "x", "max_tokens": 20, "structured_outputs": {"regex": "[ab]{3}"}}
    assert set(replicas.client.post("/v1/completions", json=body).json()["choices"][0]["text"]) <= set("ab")
    wrong = replicas.client.post("/v1/completions", json=body | {"structured_outputs": {"regex": "(("}})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_grammar")


def test_an_answer_ends_when_its_client_leaves_or_cancels(replicas: Served) -> None:
    body = BODY | {"prompt": "Once", "max_tokens": 2000, "stream": True, "logprobs": None}
    with replicas.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    eventually(lambda: metric(replicas, "loci_sequences_running") == 0, "its slot is free")
    with replicas.client.stream(
        "POST", "/v1/completions", json=body, headers={"X-Request-Id": "this"}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert replicas.client.delete("/v1/requests/this").json()["cancelled"] is True
        assert "request_cancelled" in "".join(lines)
    eventually(lambda: metric(replicas, "loci_sequences_running") == 0, "its slot is free")


def test_killed_replicas_cost_nobody_an_answer_while_one_is_left_and_come_back(replicas: Served) -> None:
    before = answered(replicas.complete())
    count, tokens = 32, 400
    expected = texts(replicas, count, tokens)
    assert len(set(expected)) == count
    retried = metric(replicas, "loci_replica_retries_total")
    gone = metric(replicas, "loci_replicas_gone_total")
    first, second = processes_of(replicas)
    events = itertools.count(1)

    def kill_amid() -> None:
        if next(events) == 2 * count:
            os.kill(second.pid, signal.SIGKILL)

    found = texts(replicas, count, tokens, kill_amid)
    assert metric(replicas, "loci_replica_retries_total") > retried
    # The other one computes again what was lost; of what had been sent already, nobody sees it twice.
    assert found == expected
    missed = partial(metric, replicas, "loci_replicas_gone_total")
    eventually(lambda: missed() == gone + 1, "its loss is counted", BACK_S)

    first.kill()  # before the second is back, as a rule: then there is none, and clients are told so
    began = time.monotonic()
    while (answer := replicas.client.post("/v1/completions", json=BODY)).status_code != 200:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text
        assert "try again" in answer.json()["error"]["message"]
        assert time.monotonic() < began + BACK_S
        time.sleep(0.5)
    assert answered(answer.json()) == before
    eventually(lambda: missed() == gone + 2, "both are missed", BACK_S)
    eventually(lambda: metric(replicas, "loci_replicas_up") == 2, "both are started again", BACK_S)


def test_what_cannot_be_is_said_before_anything_is_loaded() -> None:
    refused = run("serve", TINY, "--replicas", "2", "--port", "0")
    assert "give --cluster too" in complaint(refused.stderr)
    refused = run("serve", TINY, "--cluster", "local", "--replicas", "2", "--stages", "2", "--port", "0")
    assert "a replica is a whole model" in complaint(refused.stderr)
