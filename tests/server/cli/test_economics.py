"""`loci economics` and `loci plan --economics`: recorded and planned use, as tables, JSON and a picture."""

from __future__ import annotations

import json
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory.planner.price_files import shipped_text
from quant.errors import LociError
from server.cli.recorded_usage import NEEDED, from_metrics, from_prometheus
from tests.deploy.scraping import scraping
from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer, invoke

FLASH = ("plan", "deepseek-v4.1-flash", "--hardware", "2x4090-256g", "--prefill-chunk", "4096", "--economics")
# In 10 days 9,000,000 tokens of prompts and 450,000 of answers in 54,000 s; of the time that sequences waited
# for tokens, one part in six was for the first: 1000 and 10 tokens a second, as in test_economics.py of
# memory/planner/.
COUNTED = {
    "loci_prompt_tokens_total": 9_000_000,
    "loci_generated_tokens_total": 450_000,
    "loci_engine_step_seconds_total": 54_000,
    "loci_time_to_first_token_seconds_sum": 10_500,
    "loci_queue_time_seconds_sum": 500,
    "loci_inter_token_latency_seconds_sum": 50_000,
    "loci_prefix_cache_tokens_total": 40_000_000,
}


def page(folder: Path, **counted: float) -> Path:
    file = folder / "metrics.txt"
    file.write_text("".join(f"{name} {value}\n" for name, value in (COUNTED | counted).items()))
    return file


def report(*arguments: str | Path) -> dict[str, Any]:
    done = invoke(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_recorded_use_is_priced_from_a_saved_page(tmp_path: Path) -> None:
    costs = shipped_text("costs.toml")
    for key, value in (("idle_watts", 100), ("busy_watts", 460), ("years", 3), ("resale_share", 0.25)):
        costs = re.sub(rf"^{key} = \S+", f"{key} = {value}", costs, flags=re.MULTILINE)
    costs = costs.replace("per_kwh = 0.30", "per_kwh = 0.25").replace("0.0 ", "30.4375 ", 1)
    (tmp_path / "costs.toml").write_text(costs)
    found = report(
        "economics", "--metrics", page(tmp_path), "--days", "10", "--price", "1461", "--costs",
        tmp_path / "costs.toml",
    )  # fmt: skip
    assert found["tokens_per_day"] == {"cached": 4_000_000, "input": 900_000, "output": 45_000}
    assert found["rates"] == pytest.approx({"input_per_s": 1000.0, "output_per_s": 10.0})
    assert found["per_day"] == pytest.approx(2.735)
    assert found["per_million"][2]["full"] == pytest.approx(50.648148, abs=1e-6)
    assert found["is_quote"] is False


def test_a_plan_says_what_tokens_cost_and_what_it_assumed() -> None:
    done = invoke(*FLASH, "--price", "5200")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "Calculated from the assumptions below; no quote." in text
    assert re.search(r"^output +\d", text, re.MULTILINE)
    assert re.search(r"^deepseek-flash, off-peak +2026-10-27, to be checked ", text, re.MULTILINE)
    assert "price 5,200 (as given)" in text
    assert "a forecast of `loci plan`, not measured" in text
    assert "not verified with the provider, check before deciding" in text


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra `bench`)")
def test_costs_are_drawn(tmp_path: Path) -> None:
    done = invoke(*FLASH, "--price", "5200", "--plot", tmp_path / "costs.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (FLASH, "what the machine costs is not known: give --price"),
        ((*FLASH, "--price", "-5"), "-5 is no amount of money: give 0 or more"),
        (
            (*FLASH, "--price", "1", "--against", "x"),
            "--against x: not in the price list, which has: deepseek",
        ),
        (("economics", "--watts-query", "x"), "give --prometheus too"),
        (("economics", "--metrics", "a", "--prometheus", "b"), "give one of them"),
        (("economics", "--metrics", "none.txt"), "none.txt: cannot be read"),
        (("economics", "--metrics", "none.txt", "--hardware", "this"), "none.txt: cannot be read"),
        (("economics", "--prometheus", "http://127.0.0.1:9"), "no Prometheus answers"),
    ],
)
def test_what_cannot_be_calculated_ends_with_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = invoke(*arguments)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_prices_and_costs_in_different_currencies_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(shipped_text("prices.toml").replace("USD", "CNY"))
    done = invoke(*FLASH, "--price", "1", "--prices", tmp_path / "prices.toml")
    assert "prices in CNY, costs in USD: give all in one currency" in done.stderr


def test_this_machine_is_one_whose_price_is_not_known(tmp_path: Path) -> None:
    done = invoke("economics", "--metrics", page(tmp_path), "--days", "10", "--hardware", "this")
    assert done.returncode == 1
    assert "what the machine costs is not known: give --price" in done.stderr


def test_a_server_with_keys_is_asked_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page(tmp_path, loci_process_resident_memory_bytes=1).read_text()

    def answer(request: httpx.Request) -> httpx.Response:
        is_known = request.headers.get("authorization") == "Bearer secret"
        return httpx.Response(200, text=text) if is_known else httpx.Response(401)

    client = httpx.Client
    monkeypatch.setattr(
        httpx, "Client", lambda **options: client(transport=httpx.MockTransport(answer), **options)
    )
    asked = ("economics", "--metrics", "http://server", "--days", "10", "--price", "1461")
    refused = invoke(*asked)
    assert refused.returncode == 1
    assert "give --api-key or set LOCI_API_KEY" in refused.stderr
    assert invoke(*asked, "--api-key", "secret").returncode == 0


@pytest.mark.parametrize("missing", sorted(NEEDED.values()))
def test_a_missing_counter_is_named(tmp_path: Path, missing: str) -> None:
    file = page(tmp_path)
    file.write_text("".join(line for line in file.read_text().splitlines(True) if missing not in line))
    with pytest.raises(LociError, match=f"has no {missing}; is it the /metrics of a Loci server"):
        from_metrics(str(file), 10)


def test_a_page_that_does_not_say_since_when_it_counts_wants_days(tmp_path: Path) -> None:
    with pytest.raises(LociError, match="does not say when the server started; give --days"):
        from_metrics(str(page(tmp_path)), None)
    with pytest.raises(LociError, match="nothing was generated in that time"):
        from_metrics(str(page(tmp_path, loci_generated_tokens_total=0)), 10)


def asked(server: LociServer) -> None:
    body = {"model": TINY.name, "prompt": "A test of costs", "max_tokens": 64, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()


@pytest.mark.slow
def test_a_server_and_its_prometheus_tell_the_same_use(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(TINY).await_ready()
    asked(server)

    def later() -> float:
        return time.time() + 7200

    own = from_metrics(server.url, None, later)
    assert own.days == pytest.approx(2 / 24, rel=0.05)
    assert own.tokens.output * own.days == pytest.approx(64)
    assert own.rates.output_per_s > own.tokens.output / 86_400
    with scraping(server, "unused", tmp_path, "1s") as prometheus:
        address = str(prometheus.base_url)
        time.sleep(2)  # between two scrapes, or there is no increase
        asked(server)
        deadline = time.monotonic() + 20
        seen = None
        while time.monotonic() < deadline and (seen is None or seen.tokens.output * seen.days < 32):
            time.sleep(0.5)
            try:
                seen = from_prometheus(address, 30, "vector(300)", later)
            except LociError:  # nothing yet
                continue
        assert seen is not None
        assert seen.watts == 300
        assert seen.tokens.output * seen.days == pytest.approx(64, rel=0.5)  # Prometheus extrapolates
        with pytest.raises(LociError, match="has no value; name what measures watts"):
            from_prometheus(address, 30, "sum(no_such_series)", later)
        with pytest.raises(LociError, match="Prometheus refuses"):
            from_prometheus(address, 30, "sum(", later)
