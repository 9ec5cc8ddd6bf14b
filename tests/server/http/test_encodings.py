"""Compressed bodies are read as they were, within the limit of a body; other encodings are named."""

from __future__ import annotations

import gzip
import json
import zlib

import httpx
import pytest

from server.http.encoding import decoded
from server.http.errors import ApiError

BODY = json.dumps({"prompt": "Hello", "padding": "x" * 5000}).encode()
RAW = zlib.compressobj(wbits=-15)
CODED = {
    "gzip": gzip.compress(BODY),
    "X-GZIP": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    " deflate": RAW.compress(BODY) + RAW.flush(),
    "identity": BODY,
    "": BODY,
}


@pytest.mark.parametrize("encoding", CODED)
def test_a_body_is_read_as_it_was(encoding: str) -> None:
    assert decoded(CODED[encoding], encoding, len(BODY)) == BODY


def test_a_small_body_may_not_become_a_large_one() -> None:
    assert decoded(gzip.compress(bytes(10**8)), "gzip", 10**6) is None


@pytest.mark.parametrize("body", [BODY, gzip.compress(BODY)[:-9], b""], ids=["plain", "cut short", "empty"])
def test_what_is_not_in_its_encoding_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not gzip") as caught:
        decoded(body, "gzip", 10**6)

    assert caught.value.status == 400


def test_the_server_reads_compressed_bodies(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}

    answer = http.post("/tokenize", content=CODED["gzip"], headers=headers)
    too_large = http.post("/tokenize", content=gzip.compress(bytes(9 << 20)), headers=headers)
    other = http.post("/tokenize", content=BODY, headers=headers | {"Content-Encoding": "br"})

    assert answer.json() == http.post("/tokenize", json={"prompt": "Hello"}).json()
    assert too_large.status_code == 413
    assert other.status_code == 415
    assert "br is not supported; send gzip, deflate or no encoding" in other.json()["error"]["message"]
