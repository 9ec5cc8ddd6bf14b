"""What the tests of llama.cpp's server ask about keys, pages and origins."""

from __future__ import annotations

from tests.clients.others.checks import KEY, ORIGIN, PLAIN, Asked
from tests.clients.others.llama_cpp import LIFE, LLAMA_CPP

SECURITY = "test_security.py"


@LLAMA_CPP.test(SECURITY, "test_access_static_assets_without_api_key", note="this page's files", keyed=True)
def _assets(ask: Asked) -> None:
    for path in ("/", "/web/main.js", "/web/style.css"):
        assert ask.http.get(path).status_code == 200


@LLAMA_CPP.test(
    SECURITY, "test_access_public_endpoint", note="`/health`; `/models` wants the key", keyed=True
)
def _public(ask: Asked) -> None:
    assert ask.http.get("/health").status_code == 200


@LLAMA_CPP.test(SECURITY, "test_incorrect_api_key", "test_correct_api_key", keyed=True)
@LLAMA_CPP.test(SECURITY, "test_correct_api_key_anthropic_header", keyed=True)
def _keys(ask: Asked) -> None:
    wrong: list[dict[str, str]] = [{}, {"Authorization": "Bearer invalid-key"}]
    for headers in wrong:
        answer = ask.http.post("/completions", json=LIFE, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-Api-Key": KEY}):
        assert ask.http.post("/completions", json=LIFE, headers=headers).status_code == 200


@LLAMA_CPP.test(SECURITY, "test_openai_library_correct_api_key", keyed=True)
def _library_without_v1(ask: Asked) -> None:
    sdk = ask.sdk.with_options(base_url=str(ask.http.base_url), api_key=KEY)
    assert len(sdk.chat.completions.create(model="v41-c", **PLAIN).choices) == 1


@LLAMA_CPP.test(SECURITY, "test_cors_options", note="for the origins set; no credentials", keyed=True)
def _origins(ask: Asked) -> None:
    wanted = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "Authorization",
    }
    answer = ask.http.options("/completions", headers=wanted)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "authorization" in answer.headers["Access-Control-Allow-Headers"].lower()
