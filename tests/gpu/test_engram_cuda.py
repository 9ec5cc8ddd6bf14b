"""Engram rows on a real GPU: sent on a stream of their own, beside kernels that compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from safetensors.torch import save_file

from memory.checkpoint.safetensors_files import open_safetensors
from memory.engram.store import EngramStore, TableFiles
from memory.telemetry import Telemetry
from memory.tiers import Tier
from quant.formats.fp8 import FP8_ROW
from quant.kernels.reference import ReferenceKernels
from quant.packed import PackedTensor

pytestmark = pytest.mark.gpu
ROWS, DIM = 4000, 128
GPU = torch.device("cuda", 0)


def test_rows_arrive_while_kernels_run_and_their_memory_is_not_overwritten_too_early(tmp_path: Path) -> None:
    codes = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.full((ROWS, DIM // 32), 127, dtype=torch.uint8)
    save_file(
        {"t.scale": scales.view(torch.float8_e8m0fnu), "t.weight": codes}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text('{"model_type": "test"}')
    checkpoint = open_safetensors(tmp_path)
    files = TableFiles(checkpoint.entries["t.weight"], checkpoint.entries["t.scale"], FP8_ROW, DIM)
    table = PackedTensor(FP8_ROW, (ROWS, DIM), codes.view(torch.uint8), scales).decode()
    telemetry = Telemetry()
    gpus = {7: Tier("vram:0", 1 << 30, GPU)}
    shares = {7: files.share(20_000)}
    store = EngramStore({7: files}, checkpoint, ReferenceKernels(), shares, telemetry, gpus=gpus)
    busy = torch.randn(2048, 2048, device=GPU)
    generator = torch.Generator().manual_seed(2)
    asked, sums = [], []
    for _ in range(40):
        rows = torch.randint(0, ROWS, (512,), generator=generator)
        ticket = store.lookup(7, rows)
        for _ in range(4):
            busy = torch.nn.functional.normalize(busy @ busy)
        values = ticket.wait()
        assert values.device == GPU
        sums.append(values.sum(0) + 0 * busy[0, :DIM])  # behind the products; then the memory is given up
        asked.append(rows)
        del values, ticket
    for rows, found in zip(asked, sums, strict=True):
        torch.testing.assert_close(found.cpu(), table[rows].sum(0), atol=1e-2, rtol=1e-4)
    assert telemetry.snapshot().moved_bytes["engram to vram:0"] == 40 * 512 * DIM * 4
    store.close()
