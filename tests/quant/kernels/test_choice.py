"""Which back end computes: the compiled one, and plain torch where there was no compiler."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quant.errors import ConfigError
from quant.formats.mxfp4 import MXFP4
from quant.kernels.choice import LEVEL_VARIABLE, choose
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation whose compiled part was not built."""
    library.load.cache_clear()
    monkeypatch.setattr(library, "library_path", lambda: None)
    yield
    library.load.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_compiled_kernels_plain_torch_computes_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        kernels = choose()
        weight = MXFP4.encode(torch.randn(64, 64))
        kernels.linear(torch.randn(3, 64), kernels.prepare(weight))
        kernels.linear(torch.randn(1, 64), kernels.prepare(weight))
    assert kernels.name == "reference"
    assert "install a C++ compiler" in kernels.describe()
    (record,) = caplog.records
    assert "computing with plain PyTorch, which is slow" in record.getMessage()


def test_building_without_a_compiler_succeeds_without_the_compiled_part(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext",
         "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        env={**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_activations_are_exact_unless_asked_otherwise() -> None:
    kernels = choose()
    if not isinstance(kernels, NativeKernels):
        pytest.skip(kernels.describe())
    assert kernels.activations == "exact"


def test_a_level_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.library_path() is None:
        pytest.skip("the compiled kernels were not built")
    monkeypatch.setenv(LEVEL_VARIABLE, "avx1024")
    with pytest.raises(ConfigError, match="this machine has portable"):
        choose()
