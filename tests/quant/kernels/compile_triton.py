"""Compile every Triton kernel for an RTX 4090 (sm_89), without one; JSON on stdout.

The launches are those that `TritonKernels` makes with the dimensions of V4.1: tensors of these shapes
are described (on torch's meta device), launches are kept instead of started, and each different one is
compiled as it would be at run time. `python -m tests.quant.kernels.compile_triton` from the repository root.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quant.formats.four_bit import FourBit
from quant.formats.fp8 import FP8_32, FP8_128, FP8_ROW, Fp8
from quant.formats.int4 import INT4_32, INT4_OFFSET_128
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.cuda.launch import Launch, Launcher
from quant.kernels.cuda.linear import linear_launch
from quant.kernels.cuda.moe import moe_launches, schedule
from quant.kernels.cuda.rows import gather_launch
from quant.kernels.cuda.sinkhorn import sinkhorn_launch
from quant.kernels.interface import ExpertWeights, MoeCall
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kv_step_launches import kv_launches
from tests.quant.kernels.latent_step_launches import latent_launches
from tests.quant.kernels.step_launches import step_launches

TARGET = GPUTarget("cuda", 89, 32)
HIDDEN, WIDTH, QUERIES, LATENT, ENGRAM_DIM, VOCABULARY = 5120, 2304, 32768, 1280, 256, 129280
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def described(format_: Format, rows: int, cols: int) -> PackedTensor:
    """A weight with a shape and no bytes."""
    if isinstance(format_, Fp8):
        scales = torch.empty(format_.scale_shape(rows, cols), dtype=torch.uint8, device="meta")
        codes = torch.empty(rows, cols, dtype=torch.uint8, device="meta")
    else:
        assert isinstance(format_, FourBit)
        scales = torch.empty(format_.scale_shape(rows, cols), dtype=format_.scale_dtype, device="meta")
        codes = torch.empty(rows, cols // 2, dtype=torch.uint8, device="meta")
    return PackedTensor(format_, (rows, cols), codes, scales)


def launches() -> Iterator[Launch]:
    """What serving starts: one token, a few, and a prefill's many."""
    for tokens in (1, 4, 16, 512):
        for dtype in (torch.float32, torch.bfloat16):
            yield linear(MXFP4, tokens, WIDTH, HIDDEN, dtype)
            yield linear(FP8_32, tokens, QUERIES, LATENT, dtype)
        head = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="meta")
        x = torch.empty(tokens, HIDDEN, device="meta")
        yield linear_launch(x, head, torch.empty(tokens, VOCABULARY, device="meta"))
    for format_ in (NF4, INT4_32, INT4_OFFSET_128):
        for dtype in (torch.float32, torch.bfloat16):
            yield linear(format_, 512, WIDTH, HIDDEN, dtype)
    yield linear(FP8_128, 512, QUERIES, LATENT, torch.float32)
    for dtype, tokens in ((torch.bfloat16, 1), (torch.bfloat16, 1024), (torch.float32, 1024)):
        yield from moe(MXFP4, tokens, dtype)
    yield from moe(NF4, 1024, torch.bfloat16)
    yield from moe(NF4, 1024, torch.float32)
    matrices = torch.empty(512, 4, 4, device="meta")
    yield from step_launches()
    yield from latent_launches()
    yield from kv_launches()
    yield sinkhorn_launch(matrices, torch.empty_like(matrices), 20, 1e-6)
    wanted = torch.empty(24, dtype=torch.int64, device="meta")
    for table in (FP8_ROW, MXFP4):
        out = torch.empty(24, ENGRAM_DIM, device="meta")
        yield gather_launch(described(table, 384_006_168, ENGRAM_DIM), wanted, out)


def linear(format_: Format, tokens: int, rows: int, cols: int, dtype: torch.dtype) -> Launch:
    x = torch.empty(tokens, cols, dtype=dtype, device="meta")
    out = torch.empty(tokens, rows, dtype=dtype, device="meta")
    return linear_launch(x, described(format_, rows, cols), out)


def moe(format_: Format, tokens: int, dtype: torch.dtype) -> tuple[Launch, Launch]:
    gate_up, down = described(format_, WIDTH, HIDDEN), described(format_, HIDDEN, WIDTH)
    expert = ExpertWeights(gate_up, gate_up, down)
    x = torch.empty(tokens, HIDDEN, dtype=dtype, device="meta")
    ids = torch.arange(6).repeat(tokens, 1)
    weights = torch.empty(tokens, 6, device="meta")
    call = MoeCall(x, ids, weights, dict.fromkeys(range(6), expert), 10.0)
    found = moe_launches(call, schedule(ids, dtype))
    return found.gate_up, found.down(torch.empty(6 * tokens, HIDDEN, device="meta"), 0, HIDDEN)


class Compiler(Launcher):
    """Compiles a launch for the target instead of starting it."""

    def start(self, launch: Launch) -> None:
        self.compile(launch)

    def compile(self, launch: Launch) -> dict[str, Any]:
        """The kernel's name, size, shared memory, registers and spilled bytes."""
        names = launch.kernel.arg_names
        signature, attributes = {}, {}
        for number, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[number,] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[number,] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        signature |= dict.fromkeys(launch.constants, "constexpr")
        source = ASTSource(launch.kernel, signature, launch.constants, attributes)
        kernel = triton.compile(source, target=TARGET, options={"num_warps": launch.num_warps})
        return {
            "name": launch.kernel.fn.__name__,
            "signature": list(signature.values()),
            "constants": launch.constants,
            "cubin_bytes": len(kernel.asm["cubin"]),
            "shared_bytes": kernel.metadata.shared,
            **resources(kernel.asm["ptx"]),
        }


def resources(ptx: str) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, as the assembler counts them."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [
            str(assembler),
            "-v",
            "--gpu-name",
            "sm_89",
            str(file),
            "-o",
            str(file.with_suffix(".cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill", said)
    assert registers is not None, said
    return {"registers": int(registers.group(1)), "spilled_bytes": sum(int(n) for n in spilled)}


def main() -> None:
    compiler = Compiler()
    different: dict[str, Launch] = {}
    for launch in launches():
        shapes = [a.dtype if isinstance(a, torch.Tensor) else "number" for a in launch.arguments]
        different.setdefault(f"{launch.kernel.fn.__name__} {shapes} {launch.constants}", launch)
    json.dump([compiler.compile(launch) for launch in different.values()], sys.stdout, indent=1)


if __name__ == "__main__":
    main()
