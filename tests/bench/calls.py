"""What calling the kernels costs beside computing: `python -m tests.bench.calls`.

First a call with next to nothing to compute: again and again, and after as many bytes were read as a product
or a layer of experts reads, which sweeps Python and torch out of the caches. Then products of one token, in
calls of one matrix and in one call of as many rows, both against plain reads. `loci` asks for huge pages;
here THP_MEM_ALLOC_ENABLE=1 does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from quant.bench.arena import Arena
from quant.bench.decode import HIDDEN, TOP_K, WIDTH, due, read_case
from quant.bench.timing import Case, take_turns
from quant.formats.fp8 import FP8_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.choice import choose
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cpu.panels import tile
from quant.kernels.interface import MoeCall
from quant.packed import Format

ARENA_BYTES = 1 << 30
MATRIX_BYTES, EXPERTS_BYTES = 6 << 20, 113 << 20  # that one FP4 matrix and six experts take
TOGETHER = 8  # matrices
CALLS, TURNS = 60, 25


def call_us(arena: Arena, swept_bytes: int, call: Callable[[], object]) -> float:
    """Microseconds that `call` takes after each reading of so many bytes."""
    taken = []
    for i in range(CALLS):
        if swept_bytes:
            arena.read(i % (len(arena.bytes) // swept_bytes) * swept_bytes, swept_bytes)
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


def print_calls(arena: Arena, kernels: NativeKernels) -> None:
    matrix, x = tile(MXFP4.encode(torch.randn(32, 128))), torch.randn(1, 128)
    experts = Arena(1 << 20, kernels).experts(ExpertSlotLayout(128, 32, MXFP4), TOP_K)
    ids, factors = torch.arange(TOP_K).unsqueeze(0), torch.full((1, TOP_K), 1 / TOP_K)
    calls: dict[str, Callable[[], object]] = {
        "a product of 32x128": lambda: kernels.linear(x, matrix),
        "six experts of 32x128": lambda: kernels.moe(MoeCall(x, ids, factors, experts, 10.0)),
    }
    for name, call in calls.items():
        figures = [f"{call_us(arena, nbytes, call):.0f}" for nbytes in (0, MATRIX_BYTES, EXPERTS_BYTES)]
        print(f"{name}: {', '.join(figures)} us again and again, after 6 MiB, after 113 MiB")


def print_products(arena: Arena, kernels: NativeKernels, name: str, format_: Format) -> None:
    small = tile(format_.encode(torch.randn(WIDTH, HIDDEN)))
    large = tile(format_.encode(torch.randn(TOGETHER * WIDTH, HIDDEN)))
    x = torch.randn(1, HIDDEN)

    def many_calls(turn: int) -> None:
        for matrix in due(matrices, TOGETHER, turn):
            kernels.linear(x, matrix)

    matrices = arena.matrices(small)
    cases = [
        read_case(arena, large.nbytes),
        Case("many calls", TOGETHER * small.nbytes, many_calls),
        Case("one call", large.nbytes, lambda _turn: kernels.linear(x, large)),
    ]
    rates = take_turns(cases, TURNS)
    print(
        f"{name}: {rates.ratio('many calls', 'read'):.2f} of reads in calls of one matrix, "
        f"{rates.ratio('one call', 'read'):.2f} in one call of {TOGETHER} matrices' rows; "
        f"reads {rates.median('read') / 1e9:.0f} GB/s"
    )


def main() -> None:
    kernels = choose()
    assert isinstance(kernels, NativeKernels)
    print(kernels.describe())
    arena = Arena(ARENA_BYTES, kernels)
    print_calls(arena, kernels)
    for name, format_ in (("FP4", MXFP4), ("FP8", FP8_32), ("NF4", NF4)):
        print_products(arena, kernels, name, format_)


if __name__ == "__main__":
    main()
