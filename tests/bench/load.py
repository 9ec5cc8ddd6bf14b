"""Many streaming clients, some of which leave without a word, against a real server: nothing may be lost.

    python -m tests.bench.load --clients 64 --seconds 180

Every stream that was read to its end must have a finish reason and as many tokens as it was promised.
Afterwards no sequence, no slot and no file descriptor may be left, and the server's metrics must agree
with what the clients counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from engine.bench.streams import Timeline, percentile
from quant.errors import LociError
from server.cli.bench.client import Target, stream_completion
from tests.server.harness import TINY, LociServer

ROUTE = "/v1/completions"
SHARED = [7, 8, 9] * 30  # a third of the prompts begin with it, as with a system prompt
LEAVING = 0.4  # share of the requests whose client leaves before the end
SETTLE_S = 30.0


@dataclass
class Tally:
    """What the clients saw."""

    complete: list[Timeline] = field(default_factory=list)
    left: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.complete) + self.left + self.refused


async def run_load(server: LociServer, model: str, clients: int, seconds: float, seed: int = 1) -> Tally:
    """Let `clients` clients ask, read and leave for `seconds`; the tally's problems say what went wrong."""
    tally = Tally()
    target = Target(server.url, model)
    before = Book(server)
    deadline = time.monotonic() + seconds
    await asyncio.gather(*(_client(target, random.Random(seed + n), deadline, tally) for n in range(clients)))
    await _check(server, before, tally)
    return tally


class Book:
    """The server's own figures at one moment."""

    def __init__(self, server: LociServer) -> None:
        self.files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        page = httpx.get(f"{server.url}/metrics").text
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
        self.values: dict[str, float] = defaultdict(float)
        self.statuses = Counter[str]()
        for sample in samples:
            if sample.name == "loci_http_requests_total":
                if sample.labels["route"] == ROUTE:
                    self.statuses[sample.labels["status"]] += int(sample.value)
            elif not sample.labels:
                self.values[sample.name] += sample.value

    @property
    def busy(self) -> float:
        """Sequences that run or wait."""
        return self.values["loci_sequences_running"] + self.values["loci_sequences_waiting"]


async def _client(target: Target, dice: random.Random, deadline: float, tally: Tally) -> None:
    while time.monotonic() < deadline:
        shared = SHARED if dice.random() < 1 / 3 else []
        prompt = shared + dice.choices(range(100, 1000), k=dice.randint(1, 120))
        tokens = dice.randint(1, 80)
        fields = {
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": dice.random(),
        }
        stays_s = dice.expovariate(1.0) if dice.random() < LEAVING else None
        try:
            timeline = await asyncio.wait_for(stream_completion(target, fields), stays_s)
        except TimeoutError:
            tally.left += 1
        except LociError as error:
            if "queue_full" not in str(error):
                tally.problems.append(f"a request failed: {error}")
                return
            tally.refused += 1
            await asyncio.sleep(dice.random())
        except OSError as error:
            tally.problems.append(f"a connection failed: {error!r}")
            return
        else:
            tally.complete.append(timeline)
            ended = timeline.finish_reason, timeline.tokens
            if ended != ("length", tokens):
                tally.problems.append(f"a stream of {tokens} tokens ended with {ended}")


async def _check(server: LociServer, before: Book, tally: Tally) -> None:
    """Once the server has nothing to do, its figures must agree with the clients'."""
    end = time.monotonic() + SETTLE_S
    problems = ["the server was not looked at"]
    while problems and time.monotonic() < end:
        await asyncio.sleep(0.1)
        problems = _disagreements(before, Book(server), tally)
    tally.problems += problems


def _disagreements(before: Book, after: Book, tally: Tally) -> list[str]:
    found = []
    if after.busy:
        found.append(f"{after.busy:.0f} sequences are left")
    if after.values["loci_kv_tokens_used"]:
        found.append(f"{after.values['loci_kv_tokens_used']:.0f} tokens are left in the KV cache")
    if after.files > before.files:
        found.append(f"{after.files - before.files} file descriptors are left")
    statuses = after.statuses - before.statuses
    # Who leaves may have had the head of an answer (200), or not (499), or not have been heard at all.
    complete, heard = len(tally.complete), sum(statuses.values())
    if statuses["200"] < complete or statuses["429"] < tally.refused:
        found.append(f"{complete} streams and {tally.refused} refusals were counted as {dict(statuses)}")
    if set(statuses) - {"200", "429", "499"} or not tally.requests - tally.left <= heard <= tally.requests:
        found.append(f"{tally.requests} requests ({tally.left} left) were counted as {dict(statuses)}")
    tokens = after.values["loci_generated_tokens_total"] - before.values["loci_generated_tokens_total"]
    if tokens < sum(timeline.tokens for timeline in tally.complete):
        found.append(f"{tokens:.0f} tokens were counted, but more were received")
    if after.values["loci_prefix_cache_bytes"] > after.values["loci_prefix_cache_budget_bytes"]:
        found.append("the prefix cache exceeds its budget")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--max-num-seqs", str(wanted.slots), "--served-model-name", "load", "--log-level", "warning"]
        flags += ["--max-waiting", str(2 * wanted.clients)]
        server = LociServer(Path(folder), [wanted.model, *flags])
        try:
            server.await_ready()
            began = time.monotonic()
            tally = asyncio.run(run_load(server, "load", wanted.clients, wanted.seconds))
            took = time.monotonic() - began
        finally:
            server.kill()
        log = server.err.read_text()
    tokens = sum(timeline.tokens for timeline in tally.complete)
    gaps = [gap for timeline in tally.complete for gap in timeline.itl_s]
    first = [timeline.ttft_s for timeline in tally.complete]
    report = {
        "clients": wanted.clients,
        "seconds": round(took, 1),
        "requests": tally.requests,
        "complete": len(tally.complete),
        "left": tally.left,
        "refused": tally.refused,
        "output_token_throughput": round(tokens / took, 1),
        **{f"ttft_ms_p{p}": round(1e3 * percentile(first, p), 1) for p in (50, 99)},
        **{f"itl_ms_p{p}": round(1e3 * percentile(gaps, p), 1) for p in (50, 99)},
        "problems": tally.problems,
        "log_lines": log.splitlines()[-20:],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if wanted.json is not None:
        wanted.json.write_text(text)
    sys.exit(1 if tally.problems or log else 0)


if __name__ == "__main__":
    main()
