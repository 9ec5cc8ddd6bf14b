"""Many tokens: arithmetic speed of packed products against torch's own matrix products."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from quant.bench.decode import HIDDEN, WIDTH, Both
from quant.bench.timing import Case, Figure, take_turns
from quant.errors import ConfigError
from quant.formats.fp8 import FP8_32
from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.interface import Weight
from quant.packed import PackedTensor

TOKENS = (64, 512)
# What bfloat16 products should reach of torch's.
BF16_TARGET = 1.0
# Exact activations are float32, so float32 products are their equal; int8 ones compete with bfloat16.
EQUALS = {"exact": "torch_fp32", "int8": "torch_bf16"}


def measure_prefill(both: Both, turns: int, target: float) -> list[Figure]:
    """GFLOP/s of an FP4 product `[tokens, 5120] x [5120, 2304]` and of others; ratios to torch's.

    Products in bfloat16 (`Kernels.multiplying`) are measured where the processor has them.
    """
    stored = MXFP4.encode(torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5)
    fp8 = both.modes["exact"].prepare(FP8_32.encode(torch.randn(WIDTH, HIDDEN)))
    half = _bfloat16_kernels(both.modes["exact"].level)
    figures, lowest, lowest_bf16 = [], [], []
    for tokens in TOKENS:
        rates = take_turns(_cases(both, half, tokens, stored, fp8), turns)
        figures += [
            Figure(f"prefill_{tokens}_{case}", rates.median(case) / 1e9, "GFLOP/s") for case in rates.per_turn
        ]
        for mode, equal in EQUALS.items():
            name, suffix = f"fp4_prefill_{tokens}_vs", both.suffix(mode)
            figures += [
                Figure(f"{name}_{other}{suffix}", rates.ratio(f"fp4_{mode}", other), "ratio")
                for other in EQUALS.values()
            ]
            for other in EQUALS.values():
                dequantised = other.replace("torch", "dequantised")
                faster = rates.ratio(f"fp4_{mode}", dequantised)
                promised = 1.0 if other == equal else None
                figures.append(Figure(f"{name}_{dequantised}{suffix}", faster, "ratio", promised))
            if mode == both.default:
                lowest.append(rates.ratio(f"fp4_{mode}", equal))
        if half is not None:
            ratio = rates.ratio("fp4_bf16", "torch_bf16")
            figures.append(Figure(f"fp4_prefill_{tokens}_vs_torch_bf16_bf16", ratio, "ratio"))
            lowest_bf16.append(ratio)
    figures.append(Figure("fp4_prefill_flops_ratio", min(lowest), "ratio", target))
    if lowest_bf16:
        figures.append(Figure("fp4_prefill_bf16_flops_ratio", min(lowest_bf16), "ratio", BF16_TARGET))
    return figures


def _bfloat16_kernels(level: str) -> NativeKernels | None:
    try:
        return NativeKernels("bf16", level)
    except ConfigError:
        return None


def _cases(
    both: Both, rounding: NativeKernels | None, tokens: int, stored: PackedTensor, fp8: Weight
) -> list[Case]:
    kernels = both.modes["exact"]
    fp4, plain = kernels.prepare(stored), stored.decode()
    half = plain.bfloat16()
    x = torch.randn(tokens, HIDDEN)
    x_half = x.bfloat16()
    work = 2.0 * tokens * WIDTH * HIDDEN
    cases = [
        Case("torch_fp32", work, lambda _: F.linear(x, plain)),
        Case("torch_bf16", work, lambda _: F.linear(x_half, half)),
        Case("dequantised_fp32", work, lambda _: F.linear(x, stored.decode())),
        Case("dequantised_bf16", work, lambda _: F.linear(x_half, stored.decode(torch.bfloat16))),
        Case("fp8", work, lambda _: kernels.linear(x, fp8)),
        Case("bf16", work, lambda _: kernels.linear(x, half)),
    ]
    for mode, own in both.modes.items():
        cases.append(Case(f"fp4_{mode}", work, lambda _, own=own: own.linear(x, fp4)))  # type: ignore[misc]
    if rounding is not None:
        for name, weight in (("fp4", fp4), ("fp8", fp8), ("bf16", half)):
            run = partial(rounding.linear, x, weight)
            cases.append(Case(f"{name}_bf16", work, lambda _, run=run: run()))  # type: ignore[misc]
    return cases
