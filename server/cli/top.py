"""`loci top`: what a running server does, where its weights are and what moves, from its metrics."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import httpx
import typer

from quant.errors import LociError
from server.cli.arguments import ApiKey
from server.cli.keyboard import keys
from server.cli.terminal import bytes_text, can_draw, is_terminal

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Labels = tuple[tuple[str, str], ...]
QUANTILES = (0.5, 0.9, 0.99)
WINDOW_S = 60.0  # percentiles and shares of a live view are those of so long a time
REASONS = {"demand": "demand", "prefetch": "prefetched late"}
MAX_PAGE_BYTES = 16 << 20


class Sample:
    """The metrics of a moment: `values[name][labels]`."""

    def __init__(self, page: str, at: float) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self.at = at
        self.values: dict[str, dict[Labels, float]] = defaultdict(dict)
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                self.values[sample.name][tuple(sorted(sample.labels.items()))] = sample.value

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric's values that have these labels."""
        wanted = set(labels.items())
        return sum(value for at, value in self.values[name].items() if wanted <= set(at))

    def labels(self, name: str, label: str) -> list[str]:
        """Values of a label that a metric has, sorted."""
        return sorted({dict(at)[label] for at in self.values[name] if label in dict(at)})

    def quantile(self, name: str, share: float, since: Sample | None) -> float | None:
        """The value that `share` of a histogram's observations do not exceed; None without observations.

        Of those since the sample `since`, or of all; within a bucket values are taken to lie evenly.
        """
        counts = {
            float(dict(at)["le"]): value - (since.total(f"{name}_bucket", le=dict(at)["le"]) if since else 0)
            for at, value in self.values[f"{name}_bucket"].items()
        }
        if not counts or counts[float("inf")] <= 0:
            return None
        wanted = share * counts[float("inf")]
        low, below = 0.0, 0.0
        for high, count in sorted(counts.items()):
            if count >= wanted:
                if high == float("inf"):
                    return low
                return low + (high - low) * (wanted - below) / max(count - below, 1e-9)
            low, below = high, count
        return low


def top(
    url: Annotated[str, typer.Option(help="Server to watch.")] = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    interval_s: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between updates.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print the totals since the server started and exit.")
    ] = False,
) -> None:
    """Watch a running server: requests, latencies, caches, memory by tier, hits, links, stalls, Engram rows.

    Rates are since the last update; percentiles and shares cover the last minute. Sections that do not
    apply to the server are left out. Press q or Ctrl-C to quit.

    Example: loci top --url http://127.0.0.1:8000
    """
    from rich.console import Console

    with _client(api_key) as client:
        if once or not is_terminal():
            Console(width=None if is_terminal() else 80).print(view(look(client, url)))
            return
        try:
            _watch(client, url, interval_s)
        except KeyboardInterrupt:
            return


def look_at(url: str, api_key: str | None) -> Sample:
    """A running server's metrics. Raises LociError where it does not answer."""
    with _client(api_key) as client:
        return look(client, url)


def _client(api_key: str | None) -> httpx.Client:
    headers = {b"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    return httpx.Client(headers=headers, timeout=10)


def _watch(client: httpx.Client, url: str, interval_s: float) -> None:
    """Look again and again until a person presses q. Raises LociError when the server does not answer."""
    seen = deque([look(client, url)])
    with keys() as keyboard, _screen() as show:
        show(view(seen[0]))
        while not keyboard.is_pressed(b"qQ", interval_s):
            before, now = seen[-1], look(client, url)
            if now.total("loci_engine_steps_total") < before.total("loci_engine_steps_total"):
                seen = deque([now])  # another server, which counts from zero
                show(view(now))
                continue
            seen.append(now)
            while seen[0].at < now.at - WINDOW_S and len(seen) > 2:
                seen.popleft()
            show(view(now, before, seen[0]))


@contextmanager
def _screen() -> Iterator[Callable[[Group], None]]:
    """A function that shows a view in place of the last one; as plain text, below it."""
    from rich.console import Console
    from rich.live import Live

    if not can_draw():
        yield lambda shown: Console().print(shown, "")
        return

    with Live(screen=True, auto_refresh=False) as live:
        yield lambda shown: live.update(shown, refresh=True)


def look(client: httpx.Client, url: str) -> Sample:
    """A server's metrics now. Raises LociError where none answers."""
    address = url.rstrip("/").removesuffix("/v1") + "/metrics"
    try:
        response = client.get(address)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise LociError(f"{url}: no server is answering ({error}); start one with `loci serve`") from None
    if response.status_code in (401, 403):
        raise LociError(f"{url}: the server requires an API key; give --api-key or set LOCI_API_KEY")
    if response.is_error or len(response.content) > MAX_PAGE_BYTES:
        raise LociError(f"{address}: answered {response.status_code} instead of metrics")
    try:
        sample = Sample(response.text, time.monotonic())
    except ValueError:
        raise LociError(f"{address}: not a Loci server") from None
    if "loci_process_resident_memory_bytes" not in sample.values:
        raise LociError(f"{address}: not a Loci server")
    return sample


def view(now: Sample, before: Sample | None = None, earlier: Sample | None = None) -> Group:
    """All tables that have something to show, for 80 columns.

    Rates are those since `before`, percentiles and shares those since `earlier`; where there is none,
    totals since the server started are shown.
    """
    from rich.console import Group

    tables = (
        _requests(now, before),
        _latencies(now, earlier),
        _caches(now, earlier),
        _drafts(now, earlier),
        _tiers(now, before),
        _links(now, before),
        _ahead(now),
        plan_of(now),
    )
    return Group(*(table for table in tables if table.row_count))


def _table(*headers: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="reverse")  # all must fit into a small terminal
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    return table


def _grown(now: Sample, before: Sample | None, name: str, **labels: str) -> float:
    """How much a counter grew since `before`, or its total."""
    return max(now.total(name, **labels) - (before.total(name, **labels) if before else 0.0), 0.0)


def _rate(now: Sample, before: Sample | None, name: str, **labels: str) -> float:
    """How much a counter grew a second since `before`, or its total."""
    return _grown(now, before, name, **labels) / (max(now.at - before.at, 1e-9) if before else 1.0)


def _per_second(now: Sample, before: Sample | None, name: str, **labels: str) -> str:
    """Seconds that a counter counts: as a share of the time since `before`, or their total."""
    grown = _rate(now, before, name, **labels)
    return f"{grown:.2f} s" if before is None else f"{min(grown, 1.0):.1%}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "-"


def _requests(now: Sample, before: Sample | None) -> Table:
    per = "" if before is None else "/s"
    table = _table("requests", "running", "waiting", f"answer tokens{per}", f"prompt tokens{per}", "memory")
    table.add_row(
        "",
        f"{now.total('loci_sequences_running'):.0f}",
        f"{now.total('loci_sequences_waiting'):.0f}",
        f"{_rate(now, before, 'loci_generated_tokens_total'):,.1f}",
        f"{_rate(now, before, 'loci_prompt_tokens_total'):,.1f}",
        bytes_text(int(now.total("loci_process_resident_memory_bytes"))),
    )
    return table


def _latencies(now: Sample, earlier: Sample | None) -> Table:
    table = _table("latency", *(f"p{100 * share:.0f}" for share in QUANTILES))
    for what, name in (
        ("in the queue", "loci_queue_time_seconds"),
        ("first token", "loci_time_to_first_token_seconds"),
        ("between tokens", "loci_inter_token_latency_seconds"),
        ("whole answer", "loci_end_to_end_seconds"),
    ):
        if now.total(f"{name}_count") == 0:
            continue
        found = [now.quantile(name, share, earlier) for share in QUANTILES]
        table.add_row(what, *("-" if s is None else f"{1e3 * s:,.0f} ms" for s in found))
    return table


def _caches(now: Sample, earlier: Sample | None) -> Table:
    """KV and prefixes: how full, and what prompts found there."""
    table = _table("cache", "holds", "of", "full", "prefix hits", "cached tokens")
    used, capacity = now.total("loci_kv_tokens_used"), now.total("loci_kv_tokens_capacity")
    if capacity:
        table.add_row("KV", f"{used:,.0f}", f"{capacity:,.0f} tokens", _share(used, capacity), "", "")
    if aside := now.total("loci_sequences_aside"):
        table.add_row("put aside", f"{aside:,.0f}", "sequences", "", "", "")
    held, budget = now.total("loci_prefix_cache_bytes"), now.total("loci_prefix_cache_budget_bytes")
    if budget:
        known = _grown(now, earlier, "loci_prefix_cache_tokens_total")
        computed = _grown(now, earlier, "loci_prompt_tokens_total")
        table.add_row(
            "prefixes",
            bytes_text(int(held)),
            bytes_text(int(budget)),
            _share(held, budget),
            _share(
                _grown(now, earlier, "loci_prefix_cache_hits_total"),
                _grown(now, earlier, "loci_prefix_cache_queries_total"),
            ),
            _share(known, known + computed),
        )
    return table


def _drafts(now: Sample, earlier: Sample | None) -> Table:
    """Tokens guessed ahead: how many were right, how many in a row, and what time that saved."""
    table = _table("drafts", "drafted", "accepted", "", "in a row")
    for drafter in now.labels("loci_drafted_tokens_total", "drafter"):
        drafted = _grown(now, earlier, "loci_drafted_tokens_total", drafter=drafter)
        accepted = _grown(now, earlier, "loci_accepted_draft_tokens_total", drafter=drafter)
        steps = _grown(now, earlier, "loci_draft_steps_total", drafter=drafter)
        if drafted:
            in_a_row = f"{accepted / max(steps, 1):.1f}"
            table.add_row(drafter, f"{drafted:,.0f}", f"{accepted:,.0f}", _share(accepted, drafted), in_a_row)
    if table.row_count:
        names = "loci_drafts_gained_seconds_total", "loci_drafts_lost_seconds_total"
        gained, lost = (_grown(now, earlier, name) for name in names)
        table.add_row("time", f"gained {gained:.1f} s", f"lost {lost:.1f} s", "", "")
    return table


def _tiers(now: Sample, before: Sample | None) -> Table:
    per = "" if before is None else "/s"
    table = _table("tier", "bytes held", "slots free", f"expert hits{per}", f"evicted{per}")
    tiers = {*now.labels("loci_tier_memory_bytes", "tier"), *now.labels("loci_expert_hits_total", "tier")}
    for tier in sorted(tiers):
        free = now.values["loci_expert_slots_free"].get((("tier", tier),))
        held = int(now.total("loci_tier_memory_bytes", tier=tier))
        table.add_row(
            f"{tier} (misses)" if tier == "nvme" else tier,
            bytes_text(held) if held else "-",
            "-" if free is None else f"{free:.0f}",
            f"{_rate(now, before, 'loci_expert_hits_total', tier=tier):,.0f}",
            f"{_rate(now, before, 'loci_expert_evictions_total', tier=tier):,.0f}",
        )
    return table


def _links(now: Sample, before: Sample | None) -> Table:
    """What moved over each link, how busy it was, and why computation waited for it."""
    per = "" if before is None else "/s"
    stalled, busy = "loci_stall_seconds_total", "loci_link_busy_seconds_total"
    reasons = now.labels(stalled, "reason")
    waits = [f"waited: {REASONS.get(reason, reason)}" for reason in reasons]
    table = _table("link", f"moved{per}", "busy", *waits, "failed")
    for link in sorted({*now.labels("loci_link_bytes_total", "link"), *now.labels(stalled, "link")}):
        table.add_row(
            link,
            bytes_text(int(_rate(now, before, "loci_link_bytes_total", link=link))),
            _per_second(now, before, busy, link=link) if link in now.labels(busy, "link") else "-",
            *(_per_second(now, before, stalled, link=link, reason=reason) for reason in reasons),
            f"{now.total('loci_link_failures_total', link=link):,.0f}",
        )
    return table


def _ahead(now: Sample) -> Table:
    """Totals: what was guessed and read ahead, and where Engram rows were found."""
    table = _table("since start", "", "", "", "")
    for what, name, label in (
        ("routing predictions", "loci_expert_guesses_total", "guesses"),
        ("prefetched", "loci_prefetched_experts_total", "outcome"),
        ("Engram rows", "loci_engram_rows_total", "rows"),
    ):
        cells = [f"{dict(at)[label]} {value:,.0f}" for at, value in now.values[name].items()]
        if cells:
            table.add_row(what, *cells)
    return table


def plan_of(now: Sample) -> Table:
    """What the plan expects of steps, beside what was measured since the server was ready."""
    table = _table("the plan", "expected", "measured", "ratio")
    for at, expected in now.values["loci_plan_expected"].items():
        what, unit = dict(at)["what"], dict(at)["unit"]
        measured = now.total("loci_plan_measured", what=what)
        ratio = now.values["loci_plan_ratio"].get((("what", what),))
        cells = (_quantity(expected, unit), _quantity(measured, unit))
        table.add_row(what, *cells, "-" if ratio is None else f"{ratio:.2f}")
    return table


def _quantity(value: float, unit: str) -> str:
    """A value of the plan's, in its unit."""
    kind, _, of = unit.partition("/")
    if kind == "s":
        return f"{1e3 * value:.3g} ms/{of}"
    return f"{bytes_text(int(value))}/{of}" if kind == "B" else f"{value:.0%}"
