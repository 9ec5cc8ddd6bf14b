"""`loci bench serve`: what a client sees, and what serving costs on top of the bare engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import JsonFile, OptionalNamedModel
from server.cli.progress import progress
from server.cli.terminal import print_table

if TYPE_CHECKING:
    from engine.bench.streams import Timeline
    from engine.engine import Engine
    from memory.hardware.this_machine import Result
    from server.cli.bench.client import Target
    from server.cli.bench.comparison import Comparison, Interference

RATIO_TARGET = 0.95
OVERHEAD_TARGET_US = 300.0
PERCENTILES = (50, 90, 99)
RUNNING = 4  # streams that a long prompt interferes with


def serve(
    model: OptionalNamedModel = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Server to measure instead of starting one. Without MODEL, it is not compared with the "
            "bare engine.",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LOCI_API_KEY", help="API key for --url.", show_default=False)
    ] = None,
    streams: Annotated[str, typer.Option(help="Numbers of concurrent streams, comma-separated.")] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 9,
    long_prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of a prompt that arrives while 4 streams run; 0 for none.")
    ] = 1500,
    json_file: JsonFile = None,
) -> None:
    """Measure a server as its clients see it and compare it with the bare engine in the same run.

    The server and the bare engine take turns; each loads the model, so it is in memory twice. The server's
    settings come from LOCI_* variables.

    Example: loci bench serve --streams 1,16 --json serve.json
    """
    from server.cli.bench.comparison import BEFORE_TOKENS, Load, compare, interfere

    counts = _counts(streams)
    load = Load(prompt_tokens, tokens, rounds)
    with ExitStack() as stack:
        # Enough for answers to go on until the prompt is computed, which it is by 16 tokens a step at least.
        going_on = max(tokens, long_prompt // 8 + 512)
        longest = max(long_prompt, prompt_tokens + tokens, BEFORE_TOKENS + going_on) + 1
        target, engine = _set_up(stack, model, url, api_key, max(*counts, RUNNING + 1), longest)
        with progress("rounds") as on_progress:
            done, total = itertools.count(1), len(counts) * load.all_rounds + bool(long_prompt)
            compared = {
                count: compare(target, engine, count, load, lambda: on_progress(next(done), total))
                for count in counts
            }
            interference = None
            if long_prompt:
                interference = interfere(target, RUNNING, long_prompt, going_on)
                on_progress(next(done), total)
    _print(compared, interference)
    if json_file is not None:
        from memory.hardware.detect import detect
        from memory.hardware.this_machine import write_results

        write_results(json_file, detect(), _results(compared, interference))
        print(f"written to {json_file}")


def _counts(streams: str) -> list[int]:
    try:
        counts = [int(part) for part in streams.split(",")]
    except ValueError:
        counts = [0]
    if not all(1 <= count <= 1024 for count in counts):
        raise ConfigError(f"--streams {streams!r}: expected numbers from 1 to 1024, such as 1,16")
    return counts


def _set_up(
    stack: ExitStack, model: str | None, url: str | None, api_key: str | None, most: int, longest: int
) -> tuple[Target, Engine | None]:
    """The server to measure, started unless it has a URL, and the bare engine to compare it with."""
    from server.cli.bench.client import Target
    from server.cli.child import serving
    from server.cli.talk import RemoteTalk
    from server.serving.service import bring_up, prepare
    from server.settings import resolve_settings

    engine = None
    flags = {"max_num_seqs": most, "max_model_len": longest}
    if url is None or model is not None:
        engine = bring_up(prepare(resolve_settings({"model": model, **flags}))).engine_here
        stack.callback(engine.stop)
    if url is None:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        url = stack.enter_context(serving(*([model] if model else []), *arguments))
    remote = RemoteTalk(url, api_key)
    stack.callback(remote.close)
    return Target(url, remote.name, api_key), engine


def _print(compared: dict[int, Comparison], interference: Interference | None) -> None:
    rows = []
    for streams, found in compared.items():
        every = [timeline for run in found.http for timeline in run]
        for name, values in _latencies(every).items():
            rows.append((f"{streams}", name, *(f"{value:.2f}" for value in values.values())))
    print_table(["streams", "", *(f"p{p}" for p in PERCENTILES)], rows, right=(0, 2, 3, 4))
    print()
    for streams, found in compared.items():
        text = f"{streams} streams: {found.http_throughput:.1f} tokens/s"
        if found.bare:
            text += (
                f"; {found.ratio:.3f} of the bare engine's; a step takes {found.overhead_us:.0f} us on top "
                "of the model's forward pass"
            )
        print(text)
    if interference is not None:
        from engine.bench.streams import percentile

        before, during = interference.before_s, interference.during_s
        print(
            f"while a prompt of {interference.prompt_tokens} tokens was computed "
            f"({interference.ttft_s:.2f} s), {RUNNING} running streams had gaps of "
            f"{1e3 * percentile(during, 50):.1f} ms (p50), {1e3 * percentile(during, 99):.1f} ms (p99); "
            f"before it {1e3 * percentile(before, 50):.1f} and {1e3 * percentile(before, 99):.1f} ms "
            f"(long_prompt_itl_p99_ratio {interference.p99_ratio:.2f})"
        )


def _latencies(timelines: Sequence[Timeline]) -> dict[str, dict[int, float]]:
    """Percentiles by name; what was never seen (gaps, where answers came in one piece) is left out."""
    from engine.bench.streams import percentile

    values = {
        "ttft_ms": [1e3 * t.ttft_s for t in timelines],
        "itl_ms": [1e3 * gap for t in timelines for gap in t.itl_s],
        "tpot_ms": [1e3 * t.tpot_s for t in timelines],
        "request_latency_ms": [1e3 * t.latency_s for t in timelines],
    }
    return {name: {p: percentile(found, p) for p in PERCENTILES} for name, found in values.items() if found}


def _results(compared: dict[int, Comparison], interference: Interference | None) -> list[Result]:
    from engine.bench.streams import percentile
    from memory.hardware.this_machine import Result

    results = []
    for streams, found in compared.items():
        results.append(Result(f"output_token_throughput_{streams}", found.http_throughput, "tokens/s"))
        every = [timeline for run in found.http for timeline in run]
        for name, by_percent in _latencies(every).items():
            results += [Result(f"{name}_p{p}_{streams}", value, "ms") for p, value in by_percent.items()]
        if found.bare:
            ratio, overhead = found.ratio, found.overhead_us
            met = ratio >= RATIO_TARGET
            results.append(Result(f"http_engine_ratio_{streams}", ratio, "ratio", RATIO_TARGET, met))
            # One stream's steps are those that the target is about; others sample more tokens.
            name = "step_overhead_us" if streams == 1 else f"step_overhead_us_{streams}"
            target = OVERHEAD_TARGET_US if streams == 1 else None
            met_overhead = None if target is None else overhead <= target
            results.append(Result(name, overhead, "us", target, met_overhead))
    if interference is not None:
        for when, gaps in (("before", interference.before_s), ("during", interference.during_s)):
            results += [
                Result(f"itl_ms_p{p}_{when}_long_prompt", 1e3 * percentile(gaps, p), "ms")
                for p in PERCENTILES
            ]
        results.append(Result("long_prompt_itl_p99_ratio", interference.p99_ratio, "ratio"))
        results.append(Result("ttft_ms_long_prompt", 1e3 * interference.ttft_s, "ms"))
    return results
