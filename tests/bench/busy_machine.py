"""How usable Loci stays while other programs keep all cores busy: a short answer of the demonstration model.

    python -m tests.bench.busy_machine [--busy 0,6] [--rounds 3]

Each answer is a `loci run` of its own, from its start to its end, beside so many processes that only count.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.server.harness import ROOT, command

QUESTION = "What does a cow eat?"
# It looks now and then whether who started it is still there, and ends if not.
COUNTING = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@dataclass(frozen=True)
class Times:
    """Seconds of an answer: until its first text, until its end, and those of processors."""

    first_s: float
    total_s: float
    processor_s: float


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that take all the time they get."""
    started = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def answer(tokens: int) -> Times:
    """Start `loci run`, read its answer, and wait for its end."""
    arguments = command("run", "demo", QUESTION, "--temperature", "0", "--max-tokens", str(tokens))
    used_before, began = _processor_s(), time.perf_counter()
    # Not the harness's environment: as many threads as a person would have.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        first_s = time.perf_counter() - began
        rest = process.stdout.read()
    total_s = time.perf_counter() - began
    if process.returncode or not (first + rest).strip():
        sys.exit(f"no answer: loci run ended with {process.returncode}")
    return Times(first_s, total_s, _processor_s() - used_before)


def _processor_s() -> float:
    """Of children that have ended; those that only count have not when this is asked."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--busy", default="0,6", help="numbers of busy processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of the answer")
    wanted = parser.parse_args(arguments)
    counts = [int(part) for part in wanted.busy.split(",")]
    answer(wanted.tokens)  # files come from memory afterwards
    times: dict[int, list[Times]] = {count: [] for count in counts}
    for _ in range(wanted.rounds):
        for count in counts:
            with busy(count):
                times[count].append(answer(wanted.tokens))
    print(f"{os.cpu_count()} cores; medians of {wanted.rounds}; seconds")
    print("busy processes  first text   whole  of processors")
    for count, found in times.items():
        first, total, used = (
            statistics.median(values)
            for values in zip(*((t.first_s, t.total_s, t.processor_s) for t in found), strict=True)
        )
        print(f"{count:14}  {first:10.2f}  {total:6.2f}  {used:13.2f}")


if __name__ == "__main__":
    main()
