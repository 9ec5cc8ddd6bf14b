"""What a recorded step costs by the tokens of one sequence that it computes, as where some are drafted:
paired with steps of one token, and operation by operation.

python -m tests.bench.rows_of_step demo [--position 100] [--rounds 200]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections import defaultdict
from pathlib import Path

from engine.embedded import model_path
from engine.families.base import Batch, KvCache, Model
from engine.families.loader import load
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.program import Program

ROWS = (1, 2, 4, 6, 8)
VOCAB = 3000  # tokens that every model has


def batch_of(position: int, rows: int) -> Batch:
    """Tokens of slot 0 from `position` on."""
    ids = [(7919 * number) % VOCAB + 5 for number in range(position, position + rows)]
    return Batch.of([(0, position, ids)], all_logits=True)


def step_s(model: Model, cache: KvCache, position: int, rows: int) -> float:
    """Seconds of a step; the cache is as before."""
    cache.resume(0, position, 0)
    batch = batch_of(position, rows)
    began = time.perf_counter()
    model.forward(batch, cache)
    return time.perf_counter() - began


class Operations:
    """A program's operations one by one, each by a call of its own."""

    def __init__(self, program: Program, kernels: NativeKernels) -> None:
        self._program = program
        self._kernels = kernels
        self._none_s = statistics.median(self._call_s(len(program.noted), 0) for _ in range(300))

    def seconds(self) -> dict[str, float]:
        """Of the step that ran last, by kind of operation."""
        found: dict[str, float] = defaultdict(float)
        skipped = 0
        for number, noted in enumerate(self._program.noted):
            if noted.kind == "unless_complete":
                positions, rows = self._program._positions, self._program._input.rows
                is_complete = any((positions[row] + 1) % noted.sizes[0] == 0 for row in range(rows))
                skipped = 0 if is_complete else noted.sizes[1]
            elif skipped:
                skipped -= 1
            elif noted.kind != "hand_over":
                size = f" {noted.bytes_read // 1024} KiB" if noted.bytes_read else ""
                found[noted.kind + size] += self._call_s(number, 1) - self._none_s
        return found

    def _call_s(self, first: int, count: int) -> float:
        kernels, program = self._kernels, self._program
        began = time.perf_counter()
        kernels._library.loci_run_program(
            kernels._level, kernels._threads(), kernels._activations, program._operations, first,
            first + count, ctypes.byref(program._input),
        )  # fmt: skip
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--position", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    model, position = load(model_path(Path(arguments.model))).model, arguments.position
    cache = model.new_cache(1, position + 2 * max(ROWS))
    model.forward(batch_of(0, position), cache)
    times: dict[int, list[float]] = defaultdict(list)
    for round_ in range(arguments.rounds + 5):
        for rows in ROWS:
            took = step_s(model, cache, position, rows)
            if round_ >= 5:
                times[rows].append(took)
    print("rows  us     of one row's (medians of paired rounds)")
    for rows in ROWS:
        ratio = statistics.median(a / b for a, b in zip(times[rows], times[1], strict=True))
        print(f"{rows:4}  {statistics.median(times[rows]) * 1e6:5.0f}  {ratio:5.2f}")

    program = cache.program
    assert isinstance(program, Program)
    kernels = NativeKernels()
    operations = Operations(program, kernels)
    by_rows: dict[int, dict[str, float]] = {}
    for rows in ROWS:
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(max(arguments.rounds // 4, 5)):
            step_s(model, cache, position, rows)
            for kind, seconds in operations.seconds().items():
                found[kind].append(seconds)
        by_rows[rows] = {kind: statistics.median(values) for kind, values in found.items()}
    print("\noperations of a step, one by one, us, by rows:", *ROWS)
    for kind in sorted(by_rows[max(ROWS)], key=lambda kind: -by_rows[max(ROWS)][kind]):
        print(f"{kind:20}", *(f"{by_rows[rows].get(kind, 0.0) * 1e6:8.1f}" for rows in ROWS))


if __name__ == "__main__":
    main()
