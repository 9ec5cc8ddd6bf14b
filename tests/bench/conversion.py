"""How fast `loci quantize` is: `python tests/bench/conversion.py [--json FILE]`.

Experts of V4.1's size (5120 x 2304) in MXFP4, and one dense matrix in FP8 and one in bfloat16, are
written to a temporary directory and converted. Speed is in source bytes; because the work is spread over
all cores and nothing else limits it, weights per second of one core's time say more on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from memory.convert.files import convert_checkpoint
from memory.convert.plan import Choices
from quant.formats.fp8 import FP8_32
from quant.formats.int4 import INT4_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4

HIDDEN, WIDTH = 5120, 2304
EXPERTS = 8
CONFIG = {"model_type": "deepseek_v41", "quantization_config": {"quant_method": "fp8"}}


def write_packed(path: Path) -> None:
    """Experts in MXFP4 and a dense matrix in FP8; random codes cost what real ones cost."""
    tensors: dict[str, torch.Tensor] = {}
    for expert in range(EXPERTS):
        for name, rows, cols in (("w1", WIDTH, HIDDEN), ("w3", WIDTH, HIDDEN), ("w2", HIDDEN, WIDTH)):
            stem = f"layers.0.ffn.experts.{expert}.{name}"
            tensors[f"{stem}.weight"] = torch.randint(-128, 128, (rows, cols // 2), dtype=torch.int8)
            scales = torch.full((rows, cols // 32), 120, dtype=torch.uint8)
            tensors[f"{stem}.scale"] = scales.view(torch.float8_e8m0fnu)
    packed = FP8_32.encode(torch.randn(32768, 1280) * 0.02)
    assert packed.scales is not None
    tensors["layers.0.attn.wq_b.weight"] = packed.codes.view(torch.float8_e4m3fn)
    tensors["layers.0.attn.wq_b.scale"] = packed.scales.view(torch.float8_e8m0fnu)
    write(path, tensors)


def write_plain(path: Path) -> None:
    """The same kinds of matrices in bfloat16."""
    tensors = {"layers.0.attn.wq_b.weight": torch.randn(32768, 1280).bfloat16()}
    for name, rows, cols in (("w1", WIDTH, HIDDEN), ("w3", WIDTH, HIDDEN), ("w2", HIDDEN, WIDTH)):
        tensors[f"layers.0.ffn.experts.0.{name}.weight"] = torch.randn(rows, cols).bfloat16()
    write(path, tensors)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    table = Table("conversion", "GB", "seconds", "MB/s", "million weights per core-second")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        packed, plain = Path(folder) / "packed", Path(folder) / "plain"
        write_packed(packed)
        write_plain(plain)
        for name, source, choices, weights in (
            ("mxfp4 -> nf4", packed, Choices(experts=NF4), EXPERTS * 3 * HIDDEN * WIDTH),
            ("mxfp4 -> int4_32", packed, Choices(experts=INT4_32), EXPERTS * 3 * HIDDEN * WIDTH),
            ("fp8 -> bf16", packed, Choices(dense=torch.bfloat16), 32768 * 1280),
            ("bf16 -> mxfp4", plain, Choices(experts=MXFP4), 3 * HIDDEN * WIDTH),
            ("bf16 -> fp8", plain, Choices(dense=FP8_32), 32768 * 1280),
        ):
            seen = [0]

            def progress(done: int, total: int, seen: list[int] = seen) -> None:
                seen[0] = total

            start, cpu_start = time.perf_counter(), time.process_time()
            convert_checkpoint(source, Path(folder) / name.replace(" ", ""), choices, progress)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            table.add_row(
                name,
                f"{seen[0] / 1e9:.2f}",
                f"{seconds:.1f}",
                f"{seen[0] / seconds / 1e6:.0f}",
                f"{weights / cpu_seconds / 1e6:.0f}",
            )
            results.append(
                {
                    "name": f"convert_{name.replace(' -> ', '_to_')}",
                    "value": weights / cpu_seconds,
                    "unit": "weights per core-second",
                    "target": None,
                    "met": None,
                }
            )
    Console(width=100).print(table, f"{os.cpu_count()} cores")
    if arguments.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
