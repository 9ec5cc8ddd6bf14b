"""Keys in a file: read, refused, read again, and held to their limits."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quant.errors import ConfigError
from server.http.errors import ApiError
from server.http.keys import CHECK_EVERY_S, KeyRing, read_key_file
from server.http.rate_limits import Account, Limits
from server.metrics import Metrics
from tests.server.harness import TINY, LociServer, eventually

TWO_KEYS = """
ada = "sk-one"

[bob]
key = "sk-two"
requests_per_minute = 60
tokens_per_minute = 100000
concurrent_requests = 4
"""
WriteKeys = Callable[[str], Path]


class Clock:
    """A clock that stands until it is told the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def write_keys(tmp_path: Path) -> WriteKeys:
    path = tmp_path / "keys.toml"

    def write(text: str) -> Path:
        new = tmp_path / "new.toml"
        new.write_text(text)
        new.chmod(0o600)
        return new.replace(path)

    return write


def test_a_file_has_keys_with_and_without_limits(write_keys: WriteKeys) -> None:
    keys = read_key_file(write_keys(TWO_KEYS))

    assert keys["ada"].key.get_secret_value() == "sk-one"
    assert keys["ada"].limits == Limits()
    assert keys["bob"].limits == Limits(
        requests_per_minute=60, tokens_per_minute=100_000, concurrent_requests=4
    )
    assert "sk-two" not in repr(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no keys"),
        ("ada: sk-secret", "not valid TOML; a key is a line like name = "),
        ('"a b" = "sk-secret"', "'a b' is not a valid key name"),
        ('ada = ""', "ada.key: "),
        ("[ada]\nrequests_per_minute = 5", "ada.key: Field required"),
        ('[ada]\nkey = "sk-secret"\nrequests_per_minute = "5"', "ada.requests_per_minute: "),
        ('[ada]\nkey = "sk-secret"\nrequests_per_hour = 5', "ada.requests_per_hour: Extra inputs"),
        ('ada = "sk-secret"\nbob = "sk-secret"', "the key of ada is listed twice"),
    ],
)
def test_a_wrong_file_is_explained_without_showing_a_key(
    write_keys: WriteKeys, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_key_file(write_keys(text))

    assert message in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_a_file_that_others_can_read_is_warned_about(
    write_keys: WriteKeys, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_keys(TWO_KEYS)
    read_key_file(path)
    assert not caplog.records

    path.chmod(0o640)
    read_key_file(path)

    assert f"chmod 600 {path}" in caplog.text


def test_a_changed_file_is_read_again(write_keys: WriteKeys, clock: Clock) -> None:
    ring = KeyRing(["given"], write_keys(TWO_KEYS), Metrics(), clock)
    bob = ring.account("sk-two")

    write_keys('bob = "sk-three"')
    assert ring.account("sk-two") is bob  # not looked at yet
    clock.now += CHECK_EVERY_S

    assert ring.account("sk-three") is bob
    assert ring.account("sk-two") is None
    assert ring.account("sk-one") is None
    assert ring.account("given") is not None
    assert bob is not None
    assert bob.limits == Limits()


def test_several_keys_have_salts_of_their_own_and_a_single_one_has_none(
    write_keys: WriteKeys, clock: Clock
) -> None:
    def salts(*given: str) -> list[str]:
        ring = KeyRing(given, None, Metrics(), clock)
        return [account.salt for key in given if (account := ring.account(key)) is not None]

    assert salts("sk-one") == [""]
    one, two = salts("sk-one", "sk-two")
    assert one != two
    assert salts("sk-two", "sk-one") == [two, one]  # whatever the keys are called
    assert "sk-one" not in one

    ring = KeyRing([], write_keys('ada = "sk-one"'), Metrics(), clock)
    ada = ring.account("sk-one")
    assert ada is not None
    assert ada.salt == ""
    write_keys(TWO_KEYS)
    clock.now += CHECK_EVERY_S
    assert ring.account("sk-one") is ada
    assert ada.salt == one


@pytest.mark.parametrize("broken", ["[", None])
def test_a_file_that_breaks_leaves_the_keys_as_they_were(
    write_keys: WriteKeys, clock: Clock, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    path = write_keys(TWO_KEYS)
    ring = KeyRing([], path, Metrics(), clock)

    if broken is None:
        path.unlink()
    else:
        write_keys(broken)
    clock.now += CHECK_EVERY_S

    assert ring.account("sk-one") is not None
    assert "the previous keys stay valid" in caplog.text
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    write_keys('eve = "sk-four"')
    clock.now += CHECK_EVERY_S
    assert ring.account("sk-four") is not None


def account(clock: Clock, **limits: int) -> Account:
    return Account("ada", Limits(**limits), Metrics(), clock)


def ask(account: Account) -> None:
    with account.request():
        pass


def test_requests_are_counted_by_the_minute(clock: Clock) -> None:
    ada = account(clock, requests_per_minute=2)
    ask(ada)
    ask(ada)

    with pytest.raises(ApiError, match="limited to 2 requests per minute; try again in 30 s") as caught:
        ask(ada)
    assert caught.value.status == 429
    assert caught.value.headers["Retry-After"] == "30"
    assert caught.value.headers["x-ratelimit-remaining-requests"] == "0"

    clock.now += 30
    ask(ada)


def test_tokens_may_be_overdrawn_once_and_must_then_be_paid_back(clock: Clock) -> None:
    ada = account(clock, tokens_per_minute=60)
    ask(ada)
    ada.spend(prompt=50, generated=40)

    with pytest.raises(ApiError, match="limited to 60 tokens per minute; try again in 31 s"):
        ask(ada)
    clock.now += 31
    ask(ada)
    assert dict(ada.headers()) == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "1",
        "x-ratelimit-reset-tokens": "59s",
    }


def test_requests_at_once_are_counted_until_they_end(clock: Clock) -> None:
    ada = account(clock, concurrent_requests=1)

    with ada.request(), pytest.raises(ApiError, match="limited to 1 concurrent requests"):
        ask(ada)
    ask(ada)


def test_a_request_that_was_refused_counts_for_nothing(clock: Clock) -> None:
    ada = account(clock, requests_per_minute=2, concurrent_requests=1)
    with ada.request(), pytest.raises(ApiError, match="concurrent requests"):
        ask(ada)

    ask(ada)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(
        'ada = "sk-ada"\ntim = "sk-tim"\n'
        '[bob]\nkey = "sk-bob"\nrequests_per_minute = 1\n'
        '[eve]\nkey = "sk-eve"\nconcurrent_requests = 1\n'
        '[joe]\nkey = "sk-joe"\ntokens_per_minute = 5\n'
    )
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, key_file: Path) -> Iterator[LociServer]:
    """A server whose keys are in a file, and which logs JSON."""
    flags: list[str | Path] = ["--api-key-file", key_file, "--log-format", "json"]
    started = LociServer(tmp_path_factory.mktemp("guarded"), [TINY, *flags])
    try:
        yield started.await_ready()
    finally:
        started.kill()


def sdk(server: LociServer, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


SHORT: dict[str, Any] = {"model": "v41-c", "prompt": "Once", "max_tokens": 3}
LONG = SHORT | {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}


@pytest.mark.slow
def test_a_limit_is_a_429_that_the_sdk_understands(guarded: LociServer) -> None:
    with sdk(guarded, "sk-bob") as bob:
        first = bob.completions.with_raw_response.create(**SHORT)
        with pytest.raises(openai.RateLimitError) as caught:
            bob.completions.create(**SHORT)
        assert bob.models.list().data  # asking for the model computes nothing

    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    key = {"Authorization": "Bearer sk-ada"}
    page = httpx.get(f"{guarded.url}/metrics", headers=key).text
    assert 'loci_key_refusals_total{key="bob",limit="requests_per_minute"} 1.0' in page
    assert 'loci_key_tokens_total{key="bob",kind="generated"} 3.0' in page
    assert 'loci_key_requests_total{key="bob",status="429"} 1.0' in page
    assert 'loci_http_requests_total{route="/v1/completions",status="429"} 1.0' in page
    assert "sk-" not in page


@pytest.mark.slow
def test_tokens_of_streams_are_counted_too(guarded: LociServer) -> None:
    with sdk(guarded, "sk-joe") as joe:
        list(joe.completions.create(**SHORT | {"max_tokens": 8}, stream=True))
        with pytest.raises(openai.RateLimitError, match="5 tokens per minute"):
            joe.completions.create(**SHORT)


@pytest.mark.slow
def test_a_stream_counts_as_running_until_its_client_leaves(guarded: LociServer) -> None:
    with sdk(guarded, "sk-eve") as eve:
        with eve.completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="limited to 1 concurrent requests"):
                eve.completions.create(**SHORT)

        def is_free() -> bool:
            try:
                return bool(eve.completions.create(**SHORT).choices)
            except openai.RateLimitError:
                return False

        eventually(is_free, "the request has ended")


@pytest.mark.slow
def test_a_key_finds_its_own_cached_prompts_only(guarded: LociServer) -> None:
    prompt = SHORT | {"prompt": "Once upon a time, two clients asked for the very same thing. " * 4}
    with sdk(guarded, "sk-ada") as ada, sdk(guarded, "sk-tim") as tim:
        used = [client.completions.create(**prompt).usage for client in (ada, tim, ada)]

    cached = [
        usage.prompt_tokens_details.cached_tokens
        for usage in used
        if usage is not None and usage.prompt_tokens_details is not None
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] is not None
    assert cached[2] > 0


@pytest.mark.slow
def test_a_response_belongs_to_the_key_that_made_it(guarded: LociServer) -> None:
    with sdk(guarded, "sk-ada") as ada, sdk(guarded, "sk-bob") as bob:
        response = ada.responses.create(model="v41-c", input="Hello", max_output_tokens=2)

        assert ada.responses.retrieve(response.id).id == response.id
        with pytest.raises(openai.NotFoundError):
            bob.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            bob.responses.delete(response.id)


@pytest.mark.slow
def test_a_new_key_works_without_a_restart(guarded: LociServer, key_file: Path) -> None:
    new = key_file.with_suffix(".new")
    new.write_text(key_file.read_text() + '[zoe]\nkey = "sk-zoe"\n')
    new.chmod(0o600)
    os.replace(new, key_file)

    def is_known() -> bool:
        headers = {"Authorization": "Bearer sk-zoe"}
        return httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200

    eventually(is_known, "the file is read again")


@pytest.mark.slow
def test_a_wrong_file_of_keys_ends_the_start(tmp_path: Path) -> None:
    from tests.server import harness

    result = harness.run("serve", TINY, "--port", "0", "--api-key-file", tmp_path / "none.toml")

    assert result.returncode == 1
    (line,) = harness.complaint(result.stderr).splitlines()
    assert "none.toml: No such file or directory; --api-key-file takes a TOML file" in line
