"""How usable Loci stays while other programs keep all cores busy: a short answer of the demonstration model.

    python -m tests.bench.busy_machine [--busy 0,6] [--rounds 3]

Each answer is a `loci run` of its own, from its start to its end, beside so many processes that only count.
`share` is what one of those got of a core, and `fair` what the answer would take if a single thread with that
share did all the work. Whoever waits for cores in vain takes longer. Other programs beside make everything
slower, but hardly change that ratio.
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
from dataclasses import dataclass, replace
from pathlib import Path

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
    """Seconds of an answer: until its first text, until its end, and those of processors.

    share  what a counting process got of a core meanwhile; 1 where there was none
    """

    first_s: float
    total_s: float
    processor_s: float
    share: float = 1.0


class Busy:
    """So many processes that take all the time they get."""

    def __init__(self, processes: int) -> None:
        self._began = time.perf_counter()
        self._started = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(processes)]

    def share(self) -> float:
        """What one of them has got of a core so far, in the middle."""
        if not self._started:
            return 1.0
        passed = time.perf_counter() - self._began
        return statistics.median(_processor_s(process.pid) for process in self._started) / passed

    def end(self) -> None:
        """Stop them."""
        for process in self._started:
            process.kill()
            process.wait()


@contextmanager
def busy(processes: int) -> Iterator[Busy]:
    """So many processes that take all the time they get, as long as this lasts."""
    others = Busy(processes)
    try:
        yield others
    finally:
        others.end()


def answer(tokens: int) -> Times:
    """Start `loci run`, read its answer, and wait for its end."""
    arguments = command("run", "demo", QUESTION, "--temperature", "0", "--max-tokens", str(tokens))
    used_before, began = _ended_children_s(), time.perf_counter()
    # Not the harness's environment: as many threads as a person would have.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        first_s = time.perf_counter() - began
        rest = process.stdout.read()
    total_s = time.perf_counter() - began
    if process.returncode or not (first + rest).strip():
        sys.exit(f"no answer: loci run ended with {process.returncode}")
    return Times(first_s, total_s, _ended_children_s() - used_before)


def _ended_children_s() -> float:
    """Seconds of processors; those that only count have not ended when this is asked."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _processor_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


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
            with busy(count) as others:
                found = answer(wanted.tokens)
                times[count].append(replace(found, share=others.share()))
    print(f"{os.cpu_count()} cores; medians of {wanted.rounds}; seconds")
    print("busy processes  first text   whole  of processors  share  whole / fair")
    alone_s = statistics.median(t.processor_s for t in times[min(counts)])
    for count, all_times in times.items():
        rows = [
            (t.first_s, t.total_s, t.processor_s, t.share, t.total_s * t.share / alone_s) for t in all_times
        ]
        first, total, used, share, ratio = map(statistics.median, zip(*rows, strict=True))
        print(f"{count:14}  {first:10.2f}  {total:6.2f}  {used:13.2f}  {share:5.2f}  {ratio:12.2f}")


if __name__ == "__main__":
    main()
