"""The recorded step on GPUs without a GPU: in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant.kernels.cpu import library

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (`gpu`)")
@pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")
def test_programs_for_gpus_equal_their_operations_in_the_interpreter(file: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
