"""deploy/: judged by the programs that will read it, and by metrics of a real server in a real Prometheus."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.scraping import RULES, ask, scraping
from tests.server.harness import ROOT, TINY, LociServer, eventually

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "loci.json").read_text())
KEY = "a-key-for-tests"
# A program that comes with a Python package, beside the interpreter.
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
EXPRESSIONS = [
    (panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
]


def needs(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None,
        reason=f"no {program} is installed (Debian: apt-get install {package})",
    )


def check(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a program that judges a file; what it says is in the failure."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs("promtool", "prometheus")
def test_prometheus_accepts_its_configuration_and_rules() -> None:
    check("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


@needs("promtool", "prometheus")
def test_alerts_fire_for_what_they_are_about() -> None:
    check("promtool", "test", "rules", "rules_test.yml", cwd=DEPLOY / "prometheus")


@needs("systemd-analyze", "systemd")
def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    unit = DEPLOY / "systemd" / "loci.service"
    here = tmp_path / "loci.service"  # with a program that exists on this machine
    here.write_text(unit.read_text().replace("/opt/loci/bin/loci", sys.executable))

    check("systemd-analyze", "verify", "--man=no", here)
    check("systemd-analyze", "security", "--offline=true", "--threshold=25", unit)


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint is installed (`make test` brings it)")
def test_the_dockerfiles_have_no_findings() -> None:
    check(str(HADOLINT), "Dockerfile", "deploy/cluster/Dockerfile")


def test_panels_have_places_and_names_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23  # Grafana's grid has 24 columns
    assert len({p["id"] for p in panels}) == len(panels)
    for panel in panels:
        refs = [target["refId"] for target in panel.get("targets", [])]
        assert len(refs) == len(set(refs)), panel["title"]


def _has_data(prometheus: httpx.Client, name: str) -> bool:
    return bool(ask(prometheus, name))


@pytest.fixture(scope="module")
def busy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """A model on two virtual GPUs, in DRAM and on disk, in budgets so small that everything moves."""
    devices = "virtual:64KB@100MB/s,virtual:64KB@100MB/s"
    arguments: list[str | Path] = [TINY, "--dram-budget", "1.34MB", "--devices", devices, "--api-key", KEY]
    server = LociServer(tmp_path_factory.mktemp("busy"), arguments)
    server.headers = {"Authorization": f"Bearer {KEY}"}
    try:
        yield server.await_ready()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def prometheus(busy_server: LociServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus with this repository's rules that has seen the busy server at work."""
    with scraping(busy_server, KEY, tmp_path_factory.mktemp("prometheus"), "500ms") as client:
        # Twice, so that counters with labels are seen to grow.
        for _ in range(2):
            work(busy_server)
            eventually(lambda: saw_all_work(client, busy_server), "Prometheus has seen the work")
        yield client


def work(server: LociServer) -> None:
    for text in ("Hello there", "Hello there, again", "Something else altogether"):
        body = {"model": TINY.name, "prompt": text, "max_tokens": 24, "ignore_eos": True}
        httpx.post(
            f"{server.url}/v1/completions", json=body, headers=server.headers, timeout=60
        ).raise_for_status()


def saw_all_work(client: httpx.Client, server: LociServer) -> bool:
    seen = ask(client, "sum(loci_generated_tokens_total)")
    return bool(seen) and float(seen[0]["value"][1]) == server.metric("loci_generated_tokens_total")


@pytest.mark.slow
@needs("prometheus", "prometheus")
@pytest.mark.parametrize(("panel", "expression"), EXPRESSIONS)
def test_every_panel_has_data(prometheus: httpx.Client, panel: str, expression: str) -> None:
    filled = expression.replace("$__rate_interval", "2m").replace("$instance", ".*")

    result = ask(prometheus, filled)
    assert any(math.isfinite(float(series["value"][1])) for series in result), f"{panel}: {filled}"


@pytest.mark.slow
@needs("prometheus", "prometheus")
def test_every_rule_can_be_evaluated(prometheus: httpx.Client) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    eventually(lambda: all(rule["health"] == "ok" for rule in rules()), "every rule was evaluated")
    recorded = [rule["name"] for rule in rules() if rule["type"] == "recording"]
    for name in recorded:
        eventually(partial(_has_data, prometheus, name), f"{name} has data")


@pytest.mark.slow
def test_rules_and_panels_name_only_metrics_that_exist(busy_server: LociServer) -> None:
    page = httpx.get(f"{busy_server.url}/metrics", headers=busy_server.headers).text
    known = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", page, re.MULTILINE):
        known |= {f"{name}_bucket"} if kind == "histogram" else {name}
    named = set(re.findall(r"\bloci_\w+", " ".join(text for _, text in EXPRESSIONS)))
    named |= set(re.findall(r"\bloci_\w+", RULES.read_text()))

    assert named - known == set()


@pytest.mark.slow
def test_documentation_tells_of_each_metric_and_of_none_that_is_not(busy_server: LociServer) -> None:
    page = httpx.get(f"{busy_server.url}/metrics", headers=busy_server.headers).text
    exported = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    pages = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    told = {name for text in pages.values() for name in re.findall(r"\bloci_[a-z_]+", text)}
    told_recorded = {name for text in pages.values() for name in re.findall(r"`(loci:[a-z0-9_:]+)`", text)}

    described = pages[ROOT / "docs" / "api.md"]
    assert {n for n in exported if n not in described and not n.endswith("_created")} == set()
    of_clusters = (ROOT / "server/cluster/metrics.py").read_text()  # exported with --cluster alone
    for name in re.findall(r'"(loci_(?:stage|replica)s?_[a-z_]+)"', of_clusters):
        exported |= {name, f"{name}_total"}
    assert told - exported == set()
    assert told_recorded - recorded == set()


def test_the_page_on_operations_tells_of_each_alert() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()

    alerts = set(re.findall(r"alert: (\S+)", RULES.read_text()))
    assert set(re.findall(r"^\| (Loci\w+) \|", page, re.MULTILINE)) == alerts
    rows = {panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"}
    assert {row for row in rows if f"| {row} |" not in page} == set()
