"""Engram rows: gathered and decoded, against reading as many bytes at random and doing nothing with them."""

from __future__ import annotations

import torch

from quant.bench.arena import Arena
from quant.bench.timing import Case, Figure, take_turns
from quant.formats.fp8 import FP8_ROW
from quant.kernels.cpu.native import NativeKernels
from quant.packed import PackedTensor

COLUMNS = 256  # of a row of V4.1-Flash
ROWS, CALLS = 1_000, 50  # a call, and calls a turn


def measure_rows(arena: Arena, kernels: NativeKernels, turns: int) -> list[Figure]:
    """Rows per second of a table that fills the arena: 256 codes and, elsewhere, eight scales each.

    The limit reads 256 bytes a row, in one place.
    """
    scale_bytes = COLUMNS // FP8_ROW.tile_cols
    count = len(arena.bytes) // (COLUMNS + scale_bytes)
    codes = arena.bytes[: count * COLUMNS].view(count, COLUMNS)
    codes.fill_(0x38)  # 1.0
    scales = arena.bytes[count * COLUMNS :][: count * scale_bytes].view(count, scale_bytes)
    scales.fill_(127)
    table = PackedTensor(FP8_ROW, (count, COLUMNS), codes, scales)
    calls = [[torch.randint(0, count, (ROWS,)) for _ in range(CALLS)] for _ in range(turns + 1)]

    def limit(turn: int) -> None:
        for rows in calls[turn]:
            arena.read_rows(COLUMNS, rows)

    def gather(turn: int) -> None:
        for rows in calls[-1 - turn]:  # not the rows that the limit has just brought into the cache
            kernels.gather_rows(table, rows)

    work = ROWS * CALLS
    rates = take_turns([Case("limit", work, limit), Case("gather", work, gather)], turns)
    return [
        Figure("engram_random_rows_limit", rates.median("limit") / 1e6, "Mrows/s"),
        Figure("engram_rows", rates.median("gather") / 1e6, "Mrows/s"),
        Figure("engram_rows_limit_ratio", rates.ratio("gather", "limit"), "ratio"),
    ]
