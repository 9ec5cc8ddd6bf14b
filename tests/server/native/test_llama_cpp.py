"""What clients of llama.cpp's server and of vLLM ask beside answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

SAY: list[Any] = [{"role": "user", "content": "Hello"}]


def test_the_server_tells_its_settings(http: httpx.Client) -> None:
    settings = http.get("/props").json()

    assert settings["total_slots"] == len(http.get("/slots").json()) == 4
    assert settings["default_generation_settings"]["n_ctx"] == 2048
    assert settings["modalities"] == {"vision": False, "audio": False}


def test_a_conversation_is_shown_as_the_model_sees_it(http: httpx.Client) -> None:
    prompt = http.post("/apply-template", json={"messages": SAY}).json()["prompt"]

    tokens = http.post("/tokenize", json={"messages": SAY}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": prompt, "content": prompt}


def test_tokenize_reads_llama_cpps_spelling(http: httpx.Client) -> None:
    bare = http.post("/tokenize", json={"content": "Hello", "with_pieces": True}).json()["tokens"]
    begun = http.post("/tokenize", json={"content": "Hello", "add_special": True}).json()["tokens"]

    assert "".join(token["piece"] for token in bare) == "Hello"
    assert begun == http.post("/tokenize", json={"prompt": "Hello"}).json()["tokens"]
    plain = http.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": False}).json()["tokens"]
    assert [token["id"] for token in bare] == plain


def test_the_tokenizer_is_described(http: httpx.Client) -> None:
    told = http.get("/tokenizer_info").json()

    assert told["vocab_size"] == 1024
    assert told["model_max_length"] == 2048


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_embeddings_are_refused_with_the_reason(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json={"input": "Hello"})

    assert answer.status_code == 400
    assert "makes no embeddings" in answer.text
