"""From how many tokens to an expert products in bfloat16 pay: `python -m tests.bench.prompt_experts`.

Experts of V4.1's dimensions in MXFP4, exact and in bfloat16 in turns, by processor time of one thread: what
other programs do disturbs it little. GFLOP/s, and the median of the turns' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from quant.bench.decode import HIDDEN, LIMIT, TOP_K, WIDTH
from quant.bench.timing import Case, take_turns
from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.interface import MoeCall

EXPERTS = 8
TOKENS = (3, 11, 22, 85, 512)
TURNS = 3


def thread_seconds(run: Callable[[], object]) -> float:
    """Processor time of this thread."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def main() -> None:
    exact, rounding = NativeKernels(threads=1), NativeKernels("bf16", threads=1)
    wide, narrow = (
        MXFP4.encode(torch.randn(rows, cols) / cols**0.5) for rows, cols in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))
    )
    layout = exact.slot_layout(HIDDEN, WIDTH, MXFP4)
    slots = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(EXPERTS)]
    experts = [layout.pack_into(slot, wide, wide, narrow) for slot in slots]
    for tokens in TOKENS:
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
        call = MoeCall(torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, TOP_K), experts, LIMIT)
        work = 2.0 * tokens * TOP_K * 3 * WIDTH * HIDDEN
        cases = [
            Case("exact", work, lambda _, call=call: exact.moe(call)),  # type: ignore[misc]
            Case("bf16", work, lambda _, call=call: rounding.moe(call)),  # type: ignore[misc]
        ]
        rates = take_turns(cases, TURNS, thread_seconds)
        speeds = ", ".join(f"{case.name} {rates.median(case.name) / 1e9:.0f}" for case in cases)
        print(
            f"{tokens * TOP_K / EXPERTS:.4g} tokens an expert: {speeds}, {rates.ratio('bf16', 'exact'):.2f}"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
