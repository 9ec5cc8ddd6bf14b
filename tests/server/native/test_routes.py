"""Health, readiness, version, metrics, the tokenizer, and what every answer carries."""

from __future__ import annotations

import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import LociServer, eventually

MESSAGES = [{"role": "user", "content": "Hello"}]


def test_health_and_readiness(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert set(http.get("/version").json()) == {"version"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version", "/v1/models", "/"])
def test_monitors_may_ask_for_heads(http: httpx.Client, path: str) -> None:
    head, whole = http.head(path), http.get(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert "content-length" in head.headers


@pytest.mark.parametrize("text", ["", "Hello world", "naïve 東京 🦊", "<｜User｜>"])
def test_detokenizing_restores_what_was_tokenized(http: httpx.Client, text: str) -> None:
    ids = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()

    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json()["prompt"] == text


def test_tokens_are_spelled_where_asked_for(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "Hello world", "return_token_strs": True}).json()

    assert "".join(answer["token_strs"]).endswith("Hello world")
    assert len(answer["token_strs"]) == answer["count"]


def test_a_token_that_is_part_of_a_character_is_spelled_by_its_bytes(http: httpx.Client) -> None:
    answer = http.post(
        "/tokenize", json={"prompt": "🦊", "add_special_tokens": False, "return_token_strs": True}
    ).json()

    assert "".join(answer["token_strs"]).replace("bytes:", "") == r"\xf0\x9f\xa6\x8a"


def test_a_conversation_is_tokenized_as_the_model_sees_it(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    answer = http.post(
        "/v1/chat/completions", json={"model": "v41-c", "messages": MESSAGES, "max_tokens": 1}
    ).json()

    prompt = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert "<｜User｜>Hello<｜Assistant｜>" in prompt
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "send either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "send either prompt or messages"),
        ("/tokenize", {"prompt": 5}, "prompt: Input should be a valid string, got 5"),
        ("/detokenize", {"tokens": [99999]}, "tokens: 99999 is not a token id"),
        ("/detokenize", {"tokens": "abc"}, "tokens: Input should be a valid array"),
    ],
)
def test_wrong_tokenizer_requests_are_named(
    http: httpx.Client, path: str, body: dict[str, object], message: str
) -> None:
    answer = http.post(path, json=body)

    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_metrics_are_what_prometheus_reads(server: LociServer, http: httpx.Client) -> None:
    tokens_before = server.metric("loci_generated_tokens_total")
    answers_before = server.metric("loci_http_requests_total", route="/v1/chat/completions", status="200")
    body = {"model": "v41-c", "messages": MESSAGES, "max_tokens": 5, "ignore_eos": True}
    assert http.post("/v1/chat/completions", json=body).status_code == 200

    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    assert all(name.startswith("loci_") for name in families)
    assert all(family.documentation for family in families.values())
    assert server.metric("loci_generated_tokens_total") == tokens_before + 5
    assert (
        server.metric("loci_http_requests_total", route="/v1/chat/completions", status="200")
        == answers_before + 1
    )
    for histogram in ("queue_time", "time_to_first_token", "inter_token_latency", "end_to_end"):
        assert families[f"loci_{histogram}_seconds"].type == "histogram"
        assert server.metric(f"loci_{histogram}_seconds_count") > 0
    assert server.metric("loci_inter_token_latency_seconds_count") >= 4
    assert server.metric("loci_process_resident_memory_bytes") > 50e6
    assert server.metric("loci_tier_memory_bytes", tier="dram", content="weights") > 1e6
    assert server.metric("loci_tier_memory_bytes", tier="dram", content="kv") > 1e5
    assert server.metric("loci_kv_tokens_capacity") == 4 * 2048
    assert server.metric("loci_prefix_cache_queries_total") > 0
    assert 0 < server.metric("loci_prefix_cache_bytes") < server.metric("loci_prefix_cache_budget_bytes")


def test_unknown_paths_share_one_label(server: LociServer, http: httpx.Client) -> None:
    before = server.metric("loci_http_requests_total", route="unmatched", status="404")
    for path in ("/wp-admin", "/.env", "/v1/models/none/of/this/../x"):
        http.get(path)

    pages = http.get("/metrics").text
    assert "wp-admin" not in pages
    assert server.metric("loci_http_requests_total", route="unmatched", status="404") >= before + 2


@pytest.mark.parametrize(
    ("method", "path", "headers", "route", "status"),
    [
        ("GET", "/v1/models/any", {"Host": "evil.example"}, "/v1/models/{model:path}", "403"),
        ("POST", "/v1/responses/input_tokens", {"Host": "evil.example"}, "/v1/responses/input_tokens", "403"),
        ("DELETE", "/v1/messages", {"Host": "evil.example"}, "/v1/messages", "403"),
        ("GET", "/v1/chat/completions", {}, "/v1/chat/completions", "405"),
        ("GET", "/web/style.css", {"Host": "evil.example"}, "/web/{name:path}", "403"),
        ("GET", "/nowhere", {"Host": "evil.example"}, "unmatched", "403"),
    ],
)
def test_what_is_refused_on_the_way_is_counted_by_its_route(
    server: LociServer,
    http: httpx.Client,
    method: str,
    path: str,
    headers: dict[str, str],
    route: str,
    status: str,
) -> None:
    before = server.metric("loci_http_requests_total", route=route, status=status)

    answer = http.request(method, path, headers=headers)

    assert str(answer.status_code) == status
    assert server.metric("loci_http_requests_total", route=route, status=status) == before + 1


def test_each_answer_carries_a_request_id(http: httpx.Client) -> None:
    ours = http.get("/health").headers["x-request-id"]
    theirs = http.get("/health", headers={"X-Request-Id": "trace-42"}).headers["x-request-id"]
    replaced = http.get("/health", headers={"X-Request-Id": "no spaces"}).headers["x-request-id"]

    assert re.fullmatch(r"req-[0-9a-f]{32}", ours)
    assert theirs == "trace-42"
    assert replaced.startswith("req-")


def test_the_log_has_one_line_per_request_and_no_prompts(server: LociServer, http: httpx.Client) -> None:
    body = {"model": "v41-c", "prompt": "my secret wish", "max_tokens": 2}
    http.post("/v1/completions?q=hush", json=body, headers={"X-Request-Id": "log-1"})
    http.get("/no%0Asuch", headers={"X-Request-Id": "log-2"})

    eventually(lambda: "log-2" in server.err.read_text(), "the request is logged")
    log = server.err.read_text()
    (line,) = [line for line in log.splitlines() if "log-1" in line]
    (odd,) = [line for line in log.splitlines() if "log-2" in line]
    assert re.search(r"POST /v1/completions 200 \d+\.\dms log-1$", line)
    assert re.search(r"GET /no%0Asuch 404 \d+\.\dms log-2$", odd)
    assert "secret" not in log
    assert "hush" not in log
