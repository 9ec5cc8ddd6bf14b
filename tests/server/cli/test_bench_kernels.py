"""`loci bench kernels` measures everything it promises and writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quant.kernels.cpu import library
from tests.server import harness

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

PROMISED = {
    "fp4_gemv_read_ratio",
    "fp4_moe_read_ratio",
    "fp8_gemv_read_ratio",
    "nf4_gemv_read_ratio",
    "int4_gemv_read_ratio",
    "bf16_head_gemv_read_ratio",
    "fp4_4096x2048_moe_read_ratio",
    "fp4_moe_demo_call",
    "fp4_gemv_vs_int4pack",
    "fp4_prefill_flops_ratio",
    "fp4_prefill_64_vs_dequantised_fp32",
    "engram_rows_limit_ratio",
    "cores_busy_elsewhere",
}


@pytest.mark.slow
def test_every_promised_figure_is_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    result = harness.run("bench", "kernels", "--quick", "--json", str(out))
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["cores"] >= 1
    results = {r["name"]: r for r in report["results"]}
    assert results.keys() >= PROMISED
    assert all(r["value"] > 0 for name, r in results.items() if name != "cores_busy_elsewhere")
    for r in results.values():
        assert r["met"] == (None if r["target"] is None else r["value"] >= r["target"])
    assert "fp4_moe_read_ratio" in result.stdout


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_said_so() -> None:
    result = harness.run("bench", "kernels", "--gpu", "63")
    assert result.returncode != 0
    assert "there is no CUDA GPU 63" in result.stderr
    assert "Traceback" not in result.stderr
