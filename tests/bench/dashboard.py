"""The Grafana dashboard as a picture for the documentation, drawn from its own file without Grafana.

Every panel of deploy/grafana/dashboards/loci.json is drawn with its queries, units, legends and place, from a
real Prometheus that scraped a real server: the demonstration model in budgets so small that experts move,
asked by a few clients who come and go, some of them too often for their key.

Run: python -m tests.bench.dashboard [--seconds 100]. Needs Prometheus (Debian's package) and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from tests.deploy.scraping import ask_range, scraping
from tests.server.harness import ROOT, LociServer

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "loci.json").read_text())
PICTURE = ROOT / "docs" / "images" / "dashboard.png"
TOP = PICTURE.with_name("dashboard-top.png")  # for the README: the rows up to Links and stalls
TOP_ROWS = 49
ARGUMENTS = [
    *("demo", "--dram-budget", "7MB", "--devices", "virtual:2.2MB@12.5GB/s,virtual:2.2MB@12.5GB/s"),
    *("--max-num-seqs", "3", "--max-model-len", "2048"),
]
KEYS = 'prometheus = "sk-scraper"\nada = "sk-ada"\n[bob]\nkey = "sk-bob"\nrequests_per_minute = 24\n'
SYSTEM = "You answer questions about animals, food, cities and this server in one short sentence."
QUESTIONS = ("What does a cow eat?", "What is Loci?", "What is an expert?", "What is the capital of France?")
CLIENTS = (("sk-ada", 0.0), ("sk-ada", 0.15), ("sk-bob", 0.3), ("sk-ada", 0.4), ("sk-bob", 0.5))  # from when
COLUMNS, COLUMN_PX, ROW_PX, DPI = 24, 62, 27, 100
UNITS = {"percentunit": (100.0, " %"), "s": (1.0, " s"), "bytes": (1.0, "B"), "Bps": (1.0, "B/s")}


def main() -> None:
    """Write docs/images/dashboard.png and dashboard-top.png."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=100.0)
    seconds: float = options.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "keys.toml").touch(mode=0o600)
        (folder / "keys.toml").write_text(KEYS)
        server = LociServer(folder, [*ARGUMENTS, "--api-key-file", str(folder / "keys.toml")])
        try:
            with scraping(server.await_ready(), "sk-scraper", folder, "1s") as client:
                began = time.time()
                _let_clients_ask(server, seconds)
                _draw(client, began, began + seconds)
        finally:
            server.kill()


def _let_clients_ask(server: LociServer, seconds: float) -> None:
    began = time.monotonic()
    threads = []
    for number, (key, share) in enumerate(CLIENTS):
        span = began + share * seconds, began + seconds + 2
        threads.append(threading.Thread(target=_client, args=(server, key, *span, random.Random(number))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _client(server: LociServer, key: str, first: float, last: float, dice: random.Random) -> None:
    """A conversation of a few turns, again and again; one answer in ten is not waited for."""
    time.sleep(max(0.0, first - time.monotonic()))
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        while time.monotonic() < last:
            messages = [{"role": "system", "content": SYSTEM}]
            for question in dice.sample(QUESTIONS, k=dice.randint(1, 3)):
                messages.append({"role": "user", "content": question})
                body = {"model": "loci-demo", "messages": messages, "max_tokens": dice.randint(16, 64)}
                try:
                    patience = 0.4 if dice.random() < 0.1 else 60
                    answer = http.post("/v1/chat/completions", json=body, timeout=patience)
                except httpx.TimeoutException:
                    break
                if answer.status_code == 429:
                    time.sleep(2)
                    break
                answer.raise_for_status()
                messages.append(answer.json()["choices"][0]["message"])
                time.sleep(dice.random())


def _draw(client: httpx.Client, start: float, end: float) -> None:
    mpl.rcParams.update({"font.size": 7.5, "axes.titlesize": 8.5, "font.family": "DejaVu Sans"})
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in DASHBOARD["panels"])
    figure = plt.figure(figsize=(COLUMNS * COLUMN_PX / DPI, rows * ROW_PX / DPI), dpi=DPI)
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        left, top = at["x"] / COLUMNS, 1 - at["y"] / rows
        if panel["type"] == "row":
            figure.text(0.004, top - 0.7 / rows, panel["title"], fontsize=11, weight="bold")
            continue
        width, height = at["w"] / COLUMNS, at["h"] / rows
        space = (0.036, 2.1 / rows) if panel["type"] == "timeseries" else (0.008, 0.5 / rows)
        box = (
            left + space[0],
            top - height + space[1],
            width - space[0] - 0.008,
            height - space[1] - 1.2 / rows,
        )
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], loc="left", pad=3)
        series = _series(client, panel, start, end)
        assert series, f"{panel['title']} has no data"
        {"stat": _stat, "timeseries": _timeseries}[panel["type"]](axes, panel, series, start)
    figure.savefig(PICTURE)
    width, height = figure.get_size_inches()
    share = TOP_ROWS / rows
    figure.savefig(TOP, bbox_inches=Bbox([[0, height * (1 - share)], [width, height]]))


Series = list[tuple[str, np.ndarray, np.ndarray]]  # legend, times, values


def _series(client: httpx.Client, panel: dict[str, Any], start: float, end: float) -> Series:
    found: Series = []
    for target in panel["targets"]:
        # As Grafana does: a rate looks at four scrapes at least.
        expression = target["expr"].replace("$__rate_interval", "5s").replace("$instance", ".*")
        for each in ask_range(client, expression, start, end, 1):
            legend = target["legendFormat"]
            for label, value in each["metric"].items():
                legend = legend.replace("{{" + label + "}}", value)
            times, values = np.array(each["values"], dtype=np.float64).T
            found.append((legend, times - start, values))
    return found


def _formatter(unit: str) -> Callable[[float, object], str]:
    factor, suffix = UNITS.get(unit, (1.0, " req/s" if unit == "reqps" else ""))

    def format_value(value: float, _: object = None) -> str:
        value *= factor
        if unit == "s" and abs(value) < 1:
            return f"{1000 * value:.3g} ms"
        if unit in ("bytes", "Bps") or abs(value) >= 1000:
            for prefix in ("", "k", "M", "G"):
                if abs(value) < 1000:
                    return f"{value:.3g} {prefix}{suffix}"
                value /= 1000
        return f"{value:.3g}{suffix}"

    return format_value


def _stat(axes: Axes, panel: dict[str, Any], series: Series, start: float) -> None:
    """The last value, large, over its course."""
    (_, times, values), *_ = series
    finite = np.nan_to_num(values)
    axes.fill_between(times, finite, color="tab:blue", alpha=0.15, linewidth=0)
    axes.set_ylim(0, max(2.5 * finite.max(), 1e-9))
    text = _formatter(panel["fieldConfig"]["defaults"]["unit"])(finite[-1], None)
    axes.text(0.5, 0.62, text, transform=axes.transAxes, ha="center", va="center", fontsize=15)
    axes.set_xticks([])
    axes.set_yticks([])


def _timeseries(axes: Axes, panel: dict[str, Any], series: Series, start: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    is_stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    grid = np.arange(0, max(times[-1] for _, times, _ in series) + 1)
    below = np.zeros_like(grid)
    for number, (legend, times, values) in enumerate(series):
        colour = f"C{number % 10}"
        if is_stacked:
            height = np.interp(grid, times, np.nan_to_num(values), left=0)
            axes.fill_between(grid, below, below + height, color=colour, alpha=0.35, linewidth=0)
            below = below + height
            axes.plot(grid, below, color=colour, linewidth=0.8, label=legend)
        else:
            axes.plot(times, values, color=colour, linewidth=0.9, label=legend)
    axes.set_ylim(0, None if any(np.nanmax(values) > 0 for _, _, values in series) else 1)
    axes.set_xlim(0, grid[-1])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(_formatter(defaults["unit"])))
    axes.xaxis.set_major_locator(MaxNLocator(4 if panel["gridPos"]["w"] > 5 else 2))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda second, _: time.strftime("%H:%M:%S", time.localtime(start + second)))
    )
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    columns = 3 if panel["gridPos"]["w"] > 5 else 2
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.04, -0.12), ncols=columns, frameon=False, fontsize=6,
        borderpad=0, handlelength=1, columnspacing=1, labelspacing=0.2,
    )  # fmt: skip


if __name__ == "__main__":
    main()
