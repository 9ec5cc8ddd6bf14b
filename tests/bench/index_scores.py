"""What choosing among a million entries costs a processor, beside what reading their keys would.

    python -m tests.bench.index_scores [--keys N] [--json FILE]

One layer of DeepSeek-V4.1's indexer: 32 heads of 128 columns, keys of 68 bytes, the best 512; of one token,
and of the 32 of a piece of a prompt among as many fewer keys. `key` is the time of a token and a key, all
threads together; `read_share` that of reading the keys' bytes, by that of their scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from memory.hardware.detect import detect
from memory.hardware.measure import measure_dram
from memory.hardware.this_machine import Result, write_results
from memory.pages.space import HostSpace
from quant.formats.kv import v41_rows
from quant.formats.rows import EncodedRows
from quant.kernels.cpu.native import NativeKernels

HEADS, COLUMNS, BEST = 32, 128, 512
RUNS = 7
READ_BYTES = 1 << 28


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=1 << 20)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    results = measured(asked.keys)
    for result in results:
        print(f"{result.name:<28} {result.value:10.3f} {result.unit}")
    if asked.json is not None:
        write_results(asked.json, detect(), results)


def measured(count: int) -> list[Result]:
    """Scores of so many keys, and the choice among them."""
    kernels, generator = NativeKernels(), torch.Generator().manual_seed(0)
    form = v41_rows("vendor", 512, 64, COLUMNS).index_keys
    assert form is not None
    rows = kernels.encode_rows(torch.randn(4096, COLUMNS, generator=generator), form)
    assert isinstance(rows, EncodedRows)
    space = HostSpace(-(-count * form.row_bytes // HostSpace.page_bytes) * HostSpace.page_bytes)
    codes = space.whole[: count * form.row_bytes].view(count, form.row_bytes)  # in pages, as a cache's
    for first in range(0, count, len(rows)):
        codes[first : first + len(rows)] = rows.codes[: count - first]
    reading = max(result.value for result in measure_dram(READ_BYTES) if result.unit == "GB/s") * 1e9
    found = [Result("index_read", reading / 1e9, "GB/s")]
    for tokens in (1, 32):
        queries = torch.randn(tokens, HEADS, COLUMNS, generator=generator)
        weights = torch.randn(tokens, HEADS, generator=generator)
        some = EncodedRows(codes[: count // tokens], form)
        visible = torch.full((tokens,), len(some))
        scores = kernels.index_scores(queries, weights, some, visible)
        scoring = _seconds(partial(kernels.index_scores, queries, weights, some, visible))
        choosing = _seconds(partial(kernels.best_columns, scores, BEST))
        pairs = tokens * len(some)
        found += [
            Result(f"index_scores_{tokens}", 1e3 * scoring, "ms"),
            Result(f"index_best_{tokens}", 1e3 * choosing, "ms"),
            Result(f"index_key_{tokens}", 1e9 * scoring / pairs, "ns"),
            Result(f"index_products_{tokens}", pairs * HEADS * COLUMNS / scoring / 1e9, "G/s"),
            Result(f"index_read_share_{tokens}", some.nbytes / reading / scoring, "ratio"),
        ]
    return found


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        begun = perf_counter()
        work()
        times.append(perf_counter() - begun)
    return median(times[1:])


if __name__ == "__main__":
    main()
