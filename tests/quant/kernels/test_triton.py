"""The Triton back end without a GPU: right in Triton's interpreter, and fit for sm_89 when compiled.

Both run in processes of their own, because triton decides at import whether it interprets. Needs the
`gpu` extra (triton is a gigabyte when installed), else these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (extra `gpu`)"
)

HERE = Path(__file__).parent
# Of an RTX 4090 (compute capability 8.9): what one block may have.
MAX_SHARED_BYTES = 99 * 1024
MAX_REGISTERS = 255


@pytest.mark.slow
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, object]]:
    """What compiling every kernel for sm_89 with the shapes of V4.1 gives."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.quant.kernels.compile_triton"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    kernels = json.loads(ran.stdout)
    assert isinstance(kernels, list)
    return kernels


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_89(compiled: list[dict[str, object]]) -> None:
    assert {str(kernel["name"]) for kernel in compiled} == {
        "four_bit_linear",
        "fp8_linear",
        "plain_linear",
        "moe_gate_up",
        "moe_down",
        "gather_fp8",
        "gather_four_bit",
        "sinkhorn",
        "products",
        "row_tasks",
        "read_streams",
        "write_streams",
        "add_engram",
        "repeat_row",
        "combine_elements",
        "attend_part",
        "attend_sum",
        "add_up",
        "attend_kv_sum",
        "attend_kv_part",
        "add_residual",
        "attend_latents",
        "head_products",
        "move_columns",
        "round_heads",
        "index_scores",
        "chunk_best",
        "choose",
        "encode_rows",
        "fetch_rows",
        "gate_up_of_slots",
        "down_of_slots",
    }
    assert all(kernel["cubin_bytes"] for kernel in compiled)


@pytest.mark.slow
def test_compiled_kernels_fit_the_gpu_and_spill_next_to_nothing(compiled: list[dict[str, object]]) -> None:
    for kernel in compiled:
        assert isinstance(kernel["shared_bytes"], int)
        assert isinstance(kernel["registers"], int)
        assert kernel["shared_bytes"] <= MAX_SHARED_BYTES, kernel
        assert kernel["registers"] <= MAX_REGISTERS, kernel
        assert isinstance(kernel["spilled_bytes"], int)
        assert kernel["spilled_bytes"] <= 64, kernel
