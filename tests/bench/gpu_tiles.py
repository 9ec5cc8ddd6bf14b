"""Which tiles are fastest on this GPU: every choice of `Blocks` for a few formats and numbers of tokens.

    python -m tests.bench.gpu_tiles [--formats mxfp4] [--tokens 1,8,32,512] [--products bf16] [--json FILE]

Products with matrices of V4.1's experts: one alone (2304 x 5120), and twelve in one, as a layer's experts
are. Up to 32 tokens: GB/s of the weight; more: TFLOP/s. What `Blocks.of` chooses comes first, the fastest
after it. Each result is compared with float64 before it is timed. Compiling takes most of the time: minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import torch

from quant.bench.decode import HIDDEN, WIDTH
from quant.bench.gpu import Gpu
from quant.errors import ConfigError
from quant.formats.fp8 import FP8_32
from quant.formats.int4 import INT4_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.cuda import linear as triton_linear
from quant.kernels.cuda.linear import FEW_TOKENS, Blocks
from quant.kernels.interface import Products
from quant.packed import Format, PackedTensor

FORMATS: dict[str, Format] = {"mxfp4": MXFP4, "fp8": FP8_32, "nf4": NF4, "int4": INT4_32}
TIMES = 12  # as many rows as six experts' gate and up
READ_TOKENS = 32  # up to here the weight's bytes bound a product
PLAYED = 5
MAX_ERROR = {"exact": 2e-6, "bf16": 3e-3}
SHOWN = 3


def candidates(tokens: int) -> Iterator[Blocks]:
    """Tiles that may suit so many tokens."""
    if tokens <= FEW_TOKENS:
        yield from (Blocks(1, *rest) for rest in ((4, 1024, 4), (4, 512, 2), (2, 1024, 2), (8, 1024, 4)))
        return
    high = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    for rows, cols, warps in product((32, 64, 128), (32, 64, 128), (4, 8)):
        yield Blocks(high, rows, cols, warps)
        if high == 64:
            yield Blocks(128, rows, cols, warps)


def random_weight(gpu: Gpu, format_: Format, rows: int) -> PackedTensor:
    """A packed weight on the GPU; twelve times the same one where there are more rows than an expert's."""
    one = gpu.kernels.prepare(format_.encode(torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5))
    assert isinstance(one, PackedTensor)
    assert one.scales is not None
    times = rows // WIDTH
    scales = one.scales.repeat(times, *(1,) * (one.scales.dim() - 1))
    return PackedTensor(format_, (rows, HIDDEN), one.codes.repeat(times, 1), scales)


def measure(gpu: Gpu, weight: PackedTensor, x: torch.Tensor, blocks: Blocks, products: Products) -> float:
    """GB/s or TFLOP/s of one choice. Raises what compiling raises, and ValueError for a wrong result."""
    original = Blocks.of
    triton_linear.Blocks.of = classmethod(lambda cls, tokens, dtype: blocks)  # type: ignore[method-assign,assignment]
    try:
        exact = x.double() @ weight.decode().double().T
        error = (gpu.kernels.linear(x, weight).double() - exact).norm() / exact.norm()
        if not error < MAX_ERROR[products]:
            raise ValueError(f"off by {error:.1e}")
        tokens = x.shape[0]
        if tokens <= READ_TOKENS:
            matrices = [replace(weight, codes=codes) for codes in gpu.copies(weight.codes)]
            case = gpu.products("tile", matrices, weight.nbytes, lambda m: gpu.kernels.linear(x, m))
        else:
            work = 2.0 * tokens * weight.shape[0] * weight.shape[1]
            case = gpu.recorded("tile", work, lambda: gpu.kernels.linear(x, weight))
        times = [gpu.seconds(lambda: case.run(0)) for _ in range(PLAYED + 1)]
        return case.work / statistics.median(times[1:]) / (1e9 if tokens <= READ_TOKENS else 1e12)
    finally:
        triton_linear.Blocks.of = original  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,2,4,8,32,512")
    parser.add_argument("--products", choices=get_args(Products), default="exact")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        gpu = Gpu.numbered(0)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    print(gpu.kernels.describe())
    report = []
    with torch.inference_mode():
        weights_of = {
            name: [random_weight(gpu, FORMATS[name], rows) for rows in (WIDTH, TIMES * WIDTH)]
            for name in options.formats.split(",")
        }
        for (name, weights), count in product(weights_of.items(), map(int, options.tokens.split(","))):
            x = gpu.randn(count, HIDDEN)
            dtype = torch.bfloat16 if options.products == "bf16" else x.dtype
            chosen, found = Blocks.of(count, dtype), []
            for blocks in dict.fromkeys([chosen, *candidates(count)]):
                try:
                    with gpu.kernels.multiplying(options.products):
                        rates = [measure(gpu, weight, x, blocks, options.products) for weight in weights]
                    found.append((blocks, rates))
                except Exception as error:  # too large for the GPU, or wrong: said, and the next one
                    print(f"{name} {count} {blocks}: {error}")
            ranked = sorted(found[1:], key=lambda entry: -sum(entry[1]))
            for blocks, rates in [*found[:1], *ranked[:SHOWN]]:
                mark = "chosen" if blocks == chosen else ""
                print(
                    f"{name:6} {count:4} tokens  {blocks}  {rates[0]:7.0f} {rates[1]:7.0f}  {mark}",
                    flush=True,
                )
            report += [{"format": name, "tokens": count, **vars(b), "rates": rates} for b, rates in found]
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
