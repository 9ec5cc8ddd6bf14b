"""A decode step of SmolLM2, replayed by one native call and started operation by operation, in turns.

python -m tests.bench.recorded_step [--rounds 40]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from engine.embedded import model_path
from engine.families.base import Batch, Model
from engine.families.decoder.cache import DecoderCache
from engine.families.loader import load

POSITION = 100  # tokens that every sequence holds already
ROWS = (1, 4, 8, 16)


def step_s(model: Model, cache: DecoderCache, rows: int) -> float:
    """Seconds of one step; the cache is as before."""
    for slot in range(rows):
        cache.resume(slot, POSITION, 0)
    batch = Batch.of([(slot, POSITION, [slot + 40]) for slot in range(rows)])
    started = time.perf_counter()
    model.forward(batch, cache)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    model = load(model_path(Path("smollm2"))).model
    replayed, eager = (model.new_cache(max(ROWS), 2 * POSITION) for _ in range(2))
    assert isinstance(replayed, DecoderCache)
    assert isinstance(eager, DecoderCache)
    eager.program = None
    print("rows  replayed ms  eager ms  ratio (medians of paired rounds)")
    for rows in ROWS:
        pairs = [(step_s(model, replayed, rows), step_s(model, eager, rows)) for _ in range(rounds + 3)][3:]
        first, second = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{rows:4}  {first:11.2f}  {second:8.2f}  {ratio:5.2f}")


if __name__ == "__main__":
    main()
