"""A real Prometheus that scrapes a server with this repository's rules."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.server.harness import ROOT, LociServer, eventually

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"


@contextmanager
def scraping(server: LociServer, key: str, folder: Path, interval: str) -> Iterator[httpx.Client]:
    """Prometheus (Debian's package) with its files in `folder`; a client of its API, once it has scraped."""
    config = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "loci",
                "authorization": {"credentials": key},
                "static_configs": [{"targets": [server.url.removeprefix("http://")]}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            eventually(lambda: _has_scraped(client), "Prometheus scrapes the server")
            yield client
    finally:
        process.kill()
        process.wait()


def ask(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """The series that `expression` has now."""
    return _result(client, "/api/v1/query", query=expression)


def ask_range(
    client: httpx.Client, expression: str, start: float, end: float, step: float
) -> list[dict[str, Any]]:
    """The series of `expression` from `start` to `end` (seconds since 1970), every `step` seconds."""
    return _result(client, "/api/v1/query_range", query=expression, start=start, end=end, step=step)


def _result(client: httpx.Client, path: str, **params: str | float) -> list[dict[str, Any]]:
    answer = client.get(path, params=params).json()
    assert answer["status"] == "success", answer
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def _has_scraped(client: httpx.Client) -> bool:
    try:
        return bool(ask(client, "up == 1"))
    except (httpx.TransportError, KeyError, ValueError):
        return False
