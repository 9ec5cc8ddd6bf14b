"""`loci serve MODEL` without flags beside servers tuned by hand: are the plan's choices as good?

Run: python -m tests.bench.zero_flags [demo|smollm2 ...] [--rounds 4] [--confirm 12] [--json FILE]

Each server of `grid` answers the same loads as the one without flags, in turns; who begins changes from round
to round. The best of each load is then measured again, in rounds of their own: the best of many is also the
luckiest.
`zero_flags_ratio_*` is the rate without flags over that of the best flags. LOCI_* variables must not be set.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from engine.bench.streams import throughput
from memory.hardware.detect import detect, usable_cores
from memory.hardware.this_machine import Result, write_results
from server.cli.bench.client import Target
from server.cli.bench.comparison import Load, run_http
from server.cli.bench.figures import print_figures
from server.cli.child import serving
from server.cli.talk import RemoteTalk

TARGET = 0.97
LONG_PROMPT = 1500


@dataclass(frozen=True)
class Tuned:
    """A server's flags, and the threads that it computes with."""

    flags: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def name(self) -> str:
        return " ".join([*self.flags, *([] if self.threads is None else [f"({self.threads} threads)"])])

    @property
    def variables(self) -> Mapping[str, str]:
        return {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}


def grid() -> list[Tuned]:
    """What somebody would try: one setting after another, and all that serve single answers together."""
    settings = {
        "--max-num-seqs": (1, 8, 32),
        "--prefill-chunk": (512, 2048),
        "--prefix-cache": ("0",),
        "--drafts": ("off", "lookup"),
    }
    one_by_one = [Tuned((f"{flag}={value}",)) for flag, values in settings.items() for value in values]
    threads = sorted({max(1, usable_cores() // 2), 2 * usable_cores()})
    alone = Tuned(("--max-num-seqs=1", "--drafts=off", "--prefix-cache=0", "--prefill-chunk=2048"))
    return [*one_by_one, *(Tuned(threads=count) for count in threads), alone]


def rate_of(load: Load, streams: int) -> Callable[[Target], float]:
    """Tokens per second of so many streams; of answers of one token, prompts per second."""

    def measure(target: Target) -> float:
        answers = run_http(target, load.prompts(streams), load.tokens)
        return throughput(answers) if load.tokens > 1 else 1.0 / max(a.latency_s for a in answers)

    return measure


LOADS: dict[str, Callable[[Target], float]] = {
    "alone": rate_of(Load(32, 64, 1), 1),
    "together": rate_of(Load(32, 32, 1), 16),
    "prompt": rate_of(Load(LONG_PROMPT, 1, 1), 1),
    "prompts": rate_of(Load(LONG_PROMPT, 1, 1), 4),
}


def ratios(plain: Target, tuned: Target, loads: list[str], rounds: int) -> dict[str, float]:
    """The rate without flags over that with these, by load; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in loads}
    for number in range(rounds + 1):
        for name in loads:
            order = (plain, tuned) if number % 2 else (tuned, plain)
            rates = {target.url: LOADS[name](target) for target in order}
            if number:
                found[name].append(rates[plain.url] / rates[tuned.url])
    return {name: median(values) for name, values in found.items()}


def target_of(url: str) -> Target:
    remote = RemoteTalk(url, None)
    try:
        return Target(url, remote.name)
    finally:
        remote.close()


def compared(model: str, rounds: int, confirm: int) -> list[Result]:
    """Ratios of a model, with the best flags of each load."""
    with serving(model) as url:
        plain = target_of(url)

        def beside(tuned: Tuned, loads: list[str], times: int) -> dict[str, float]:
            with serving(model, *tuned.flags, variables=tuned.variables) as other:
                return ratios(plain, target_of(other), loads, times)

        seen: dict[str, dict[Tuned, float]] = {name: {} for name in LOADS}
        for tuned in grid():
            found = beside(tuned, list(LOADS), rounds)
            text = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items())
            print(f"{model} without flags / {tuned.name}: {text}", flush=True)
            for name, ratio in found.items():
                seen[name][tuned] = ratio
        results = []
        for name, of_flags in seen.items():
            best = min(of_flags, key=lambda tuned: of_flags[tuned])
            ratio = beside(best, [name], confirm)[name]
            print(f"{model}, {name}: best with {best.name}; again {ratio:.3f}", flush=True)
            results.append(
                Result(f"zero_flags_ratio_{model}_{name}", ratio, "ratio", TARGET, ratio >= TARGET)
            )
        return results


def main(arguments: list[str]) -> None:
    """Compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo", "smollm2"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--confirm", type=int, default=12)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    if taken := [name for name in os.environ if name.startswith("LOCI_")]:
        sys.exit(f"unset {', '.join(taken)}: a server without flags has none of them")
    results = [r for model in asked.models for r in compared(model, asked.rounds, asked.confirm)]
    print_figures("without flags", results)
    if asked.json is not None:
        write_results(asked.json, detect(), results)


if __name__ == "__main__":
    main(sys.argv[1:])
