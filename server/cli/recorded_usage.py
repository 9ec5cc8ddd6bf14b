"""What a server was used for: from a Prometheus that has watched it, or from its own counters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from memory.planner.economics import DAY_S, Rates, Tokens
from quant.errors import ConfigError, LociError
from server.cli.top import MAX_PAGE_BYTES, Sample, look_at

# What is counted, by what it is; without these nothing can be said.
NEEDED = {
    "prompt": "loci_prompt_tokens_total",
    "generated": "loci_generated_tokens_total",
    "busy": "loci_engine_step_seconds_total",
    "first": "loci_time_to_first_token_seconds_sum",
    "queued": "loci_queue_time_seconds_sum",
    "between": "loci_inter_token_latency_seconds_sum",
}
CACHED = "loci_prefix_cache_tokens_total"  # a server without a prefix cache has none
EARLIEST = 1.0 / 24  # of a day: of less, nothing can be said


@dataclass(frozen=True)
class Recorded:
    """What a server did in so many days.

    tokens   of a day, on average
    rates    while it computed: prompts and answers share its seconds as their sequences did
    watts    at the wall or of its GPUs, on average, as the operator measured them; None: not measured
    source   where all that is from, for people
    """

    days: float
    tokens: Tokens
    rates: Rates
    watts: float | None
    source: str


def from_prometheus(
    url: str, days: float, watts_query: str | None = None, now: Callable[[], float] = time.time
) -> Recorded:
    """Of the last `days`, or since the Prometheus server first saw one of Loci's. Raises LociError."""
    window = f"{round(days * DAY_S)}s"
    seen = f"min_over_time(timestamp({NEEDED['generated']})"  # of the last minutes, at each second
    first_seen = f"min({seen}[{window}:5m]) or {seen}[5m:1s]))"
    with httpx.Client(timeout=60) as client:

        def ask(query: str) -> float | None:
            return _asked(client, url, query)

        began = ask(first_seen)
        if began is None:
            raise LociError(f"{url}: has no {NEEDED['generated']}; does it scrape a Loci server?")
        covered = min(days, (now() - began) / DAY_S)
        counted: dict[str, float] = {}
        for what, name in NEEDED.items():
            value = ask(f"sum(increase({name}[{window}]))")
            if value is None:
                raise LociError(f"{url}: has no {name}; does it scrape a Loci server of this version?")
            counted[what] = value
        counted["cached"] = ask(f"sum(increase({CACHED}[{window}]))") or 0.0
        watts = None
        if watts_query is not None:
            watts = ask(f"avg_over_time(({watts_query})[{window}:5m])")
            if watts is None:
                raise LociError(f"{url}: {watts_query} has no value; name what measures watts")
    return _recorded(counted, covered, watts, f"Prometheus at {url}, {covered:.3g} days")


def from_metrics(
    source: str, days: float | None, now: Callable[[], float] = time.time, *, api_key: str | None = None
) -> Recorded:
    """From a server's page of metrics: its address, or a file. They count since it started: `days` ago, or
    as long as the page itself says. Raises LociError."""
    if source.startswith(("http://", "https://")):
        sample, until = look_at(source, api_key), now()
    else:
        sample, until = _saved(Path(source)), Path(source).stat().st_mtime
    counted = {}
    for what, name in NEEDED.items():
        if name not in sample.values:
            raise LociError(f"{source}: has no {name}; is it the /metrics of a Loci server with its model?")
        counted[what] = sample.total(name)
    counted["cached"] = sample.total(CACHED)
    if days is None:
        started = [value for name in sample.values if name.endswith("_created")
                   for value in sample.values[name].values()]  # fmt: skip
        if not started:
            raise LociError(f"{source}: does not say when the server started; give --days")
        days = (until - min(started)) / DAY_S
    return _recorded(counted, days, None, f"counters of {source}, {days:.3g} days")


def _recorded(counted: dict[str, float], days: float, watts: float | None, source: str) -> Recorded:
    if counted["generated"] <= 0 or counted["busy"] <= 0:
        raise LociError(f"{source}: nothing was generated in that time")
    if days < EARLIEST:
        raise LociError(f"{source}: less than an hour says nothing of a day; try again later")
    reading = max(0.0, counted["first"] - counted["queued"])
    share = reading / (reading + counted["between"]) if reading + counted["between"] > 0 else 0.0
    reading_s, writing_s = counted["busy"] * share, counted["busy"] * (1.0 - share)

    def rate(count: float, seconds: float) -> float:
        return count / seconds if count > 0 and seconds > 0 else float("inf")

    return Recorded(
        days,
        Tokens(counted["cached"] / days, counted["prompt"] / days, counted["generated"] / days),
        Rates(rate(counted["prompt"], reading_s), rate(counted["generated"], writing_s)),
        watts,
        source,
    )


def _asked(client: httpx.Client, url: str, query: str) -> float | None:
    """The one value of an expression, None where there is none. Raises LociError."""
    address = url.rstrip("/") + "/api/v1/query"
    try:
        response = client.get(address, params={"query": query})
        answer = response.json() if len(response.content) <= MAX_PAGE_BYTES else {}
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise LociError(f"{url}: no Prometheus answers ({error})") from None
    except ValueError:
        answer = {}
    if not isinstance(answer, dict) or answer.get("status") != "success":
        said = answer.get("error") if isinstance(answer, dict) else None
        raise LociError(f"{url}: Prometheus refuses {query!r}: {said or f'status {response.status_code}'}")
    try:
        found = [float(each["value"][1]) for each in answer["data"]["result"]]
    except (KeyError, TypeError, ValueError, IndexError):
        raise LociError(f"{url}: {query!r} has no value at one moment") from None
    if len(found) > 1:
        raise LociError(f"{url}: {query!r} has {len(found)} values; write sum(...) around it")
    return found[0] if found and math.isfinite(found[0]) else None


def _saved(path: Path) -> Sample:
    try:
        if path.stat().st_size > MAX_PAGE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_PAGE_BYTES:,} bytes")
        return Sample(path.read_text(encoding="utf-8", errors="replace"), 0.0)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); save a server's /metrics there"
        ) from None
    except ValueError:
        raise ConfigError(f"{path}: not a page of metrics; save a server's /metrics there") from None
