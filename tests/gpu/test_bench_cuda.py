"""`loci bench kernels --card 0` on a real card: that every figure can be measured there."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from quant.bench.gpu import measure_card

pytestmark = pytest.mark.gpu
PROMISED = {
    "card_copy",
    "card_fp4_gemv_read_ratio",
    "card_fp4_moe_read_ratio",
    "card_fp8_gemv_read_ratio",
    "card_bf16_gemv_read_ratio",
    "card_nf4_gemv_vs_bitsandbytes",
    "card_fp4_moe_call",
    "card_prefill_64_fp4_vs_torch",
    "card_prefill_512_fp4_vs_dequantised",
    "card_expert_rearranged",
    "card_engram_rows_in_host_memory",
}


def test_every_figure_is_measured() -> None:
    figures = {figure.name: figure for _, topic in measure_card(0, 2) for figure in topic}
    assert figures.keys() >= PROMISED
    assert all(figure.value > 0 for figure in figures.values())
