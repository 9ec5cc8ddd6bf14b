"""`loci bench kernels --gpu 0` on a real GPU: that every figure can be measured there."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from quant.bench.gpu import measure_gpu

pytestmark = pytest.mark.gpu
PROMISED = {
    "gpu_copy",
    "gpu_fp4_gemv_read_ratio",
    "gpu_fp4_moe_read_ratio",
    "gpu_fp8_gemv_read_ratio",
    "gpu_bf16_gemv_read_ratio",
    "gpu_nf4_gemv_vs_bitsandbytes",
    "gpu_fp4_moe_call",
    "gpu_prefill_64_fp4_vs_torch",
    "gpu_prefill_512_fp4_vs_dequantised",
    "gpu_expert_rearranged",
    "gpu_engram_rows_in_host_memory",
}


def test_every_figure_is_measured() -> None:
    figures = {figure.name: figure for _, topic in measure_gpu(0, 2) for figure in topic}
    assert figures.keys() >= PROMISED
    assert all(figure.value > 0 for figure in figures.values())
