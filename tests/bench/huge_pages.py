"""What huge pages do for reads and products: `python -m tests.bench.huge_pages`."""

from __future__ import annotations

import mmap

import torch

from quant.bench.arena import Arena
from quant.bench.decode import HIDDEN, TOP_K, WIDTH, moe_case, product_case, read_case
from quant.bench.timing import Case, take_turns
from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout

NBYTES, HUGE = 512 << 20, 2 << 20
TURNS = 30


def arena(kernels: NativeKernels, advice: int) -> Arena:
    """Memory that begins where a huge page may."""
    mapped = mmap.mmap(-1, NBYTES + HUGE)
    mapped.madvise(advice)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    made = Arena(1, kernels)
    made.bytes = whole[-whole.data_ptr() % HUGE :][:NBYTES]
    return made


def main() -> None:
    kernels = NativeKernels()
    x = torch.randn(1, HIDDEN)
    cases: list[Case] = []
    for pages, advice in (("4 KiB", mmap.MADV_NOHUGEPAGE), ("2 MiB", mmap.MADV_HUGEPAGE)):
        memory = arena(kernels, advice)
        experts = memory.experts(ExpertSlotLayout(HIDDEN, WIDTH, MXFP4))
        product = product_case(f"matrix {pages}", kernels, [expert.w1 for expert in experts], x)
        read = read_case(memory, int(product.work))
        cases += [Case(f"read {pages}", read.work, read.run), product]
        cases.append(moe_case(f"experts {pages}", kernels, experts, HIDDEN, TOP_K, 1))
    rates = take_turns(cases, TURNS)
    for name in ("read", "matrix", "experts"):
        small, huge = f"{name} 4 KiB", f"{name} 2 MiB"
        before, after = (rates.median(case) / 1e9 for case in (small, huge))
        times = rates.ratio(huge, small)
        print(f"{name:8s} {before:.1f} GB/s, in huge pages {after:.1f}: {times:.2f} times as fast")


if __name__ == "__main__":
    main()
