"""Answers of random conversations, with aborts and restored prefixes, compared with drafts and without.

python -m tests.bench.conversations CHECKPOINT... [--count 10000] [--seed 0] [--drawn]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from engine.families.loader import load
from memory.planner.budget import MemoryBudget
from tests.engine.drafts.conversations import check

TURNS = 20  # at a time


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("checkpoints", type=Path, nargs="+", help="taken in turns")
    asked.add_argument("--count", type=int, default=10_000, help="requests in all")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument(
        "--drawn", action="store_true", help="not only greedy: with temperatures and penalties"
    )
    options = asked.parse_args()
    models = [load(path, MemoryBudget(dram_bytes=1 << 30)) for path in options.checkpoints]
    drafted = accepted = done = 0
    began = time.monotonic()
    for number in range(-(-options.count // TURNS)):
        loaded = models[number % len(models)]
        found = check(loaded, options.seed + number, TURNS, greedy=not options.drawn)
        drafted, accepted, done = drafted + found[0], accepted + found[1], done + TURNS
        if number % 25 == 24:
            print(f"{done} requests the same; {accepted} of {drafted} drafted tokens accepted", flush=True)
    print(
        f"{done} requests of {len(models)} models: every answer is the same with drafts; {accepted} of "
        f"{drafted} drafted tokens accepted; {time.monotonic() - began:.0f} s"
    )
    for loaded in models:
        loaded.model.close()


if __name__ == "__main__":
    main()
