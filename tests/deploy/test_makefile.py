"""The Makefile as make reads it: what would run, without running it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memory.hardware.detect import has_nvidia_driver
from tests.server.harness import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = ".venv/.serving"


def make(folder: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Run `make`; variables that would choose for it are taken out of its environment."""
    hidden = ("CXX", "TORCH_INDEX", "PREFIX", "MAKEFLAGS", "MAKELEVEL")
    program = shutil.which("make")
    assert program is not None
    return subprocess.run(
        [program, *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in hidden} | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the Makefile looks at, installed without a compiler and without kernels."""
    for name in ("Makefile", "pyproject.toml", "deploy/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    stamp = tmp_path / STAMP
    stamp.parent.mkdir()
    stamp.write_text("\n")
    return tmp_path


@pytest.fixture
def without_compiler(tmp_path: Path) -> Path:
    """A PATH with the few programs that the Makefile calls."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "cat", "rm"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    (folder / "python3").symlink_to(sys.executable)
    return folder


def is_up_to_date(checkout: Path, path: Path) -> bool:
    return make(checkout, "--question", STAMP, path=str(path)).returncode == 0


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_a_compiler_that_came_later_is_put_to_work(
    checkout: Path, without_compiler: Path, compiler: str
) -> None:
    assert is_up_to_date(checkout, without_compiler)

    new = without_compiler / compiler
    new.write_text("#!/bin/sh\n")
    new.chmod(0o755)

    assert not is_up_to_date(checkout, without_compiler)
    assert f'CXX="{new}"' in make(checkout, "-n", STAMP, path=str(without_compiler)).stdout


def test_a_compiler_that_failed_is_not_tried_at_every_start(checkout: Path, without_compiler: Path) -> None:
    new = without_compiler / "g++"
    new.write_text("#!/bin/sh\n")
    new.chmod(0o755)
    (checkout / STAMP).write_text(f"{new}\n")

    assert is_up_to_date(checkout, without_compiler)


def test_pytorch_with_cuda_comes_unasked_only_where_nvidias_driver_is(checkout: Path) -> None:
    (checkout / STAMP).unlink()
    words = make(checkout, "-n", STAMP).stdout
    first = words[words.index("Now PyTorch") :].partition("\n")[0].partition("||")[0]

    assert (f"--no-deps --index-url {CPU_INDEX} torch" in first) is not has_nvidia_driver()
    assert ("with CUDA: 2.7 GB to fetch" in first) is has_nvidia_driver()


def test_pytorchs_index_is_the_callers_choice(checkout: Path) -> None:
    (checkout / STAMP).unlink()
    ordinary = make(checkout, "-n", STAMP, "TORCH_INDEX=").stdout
    named = make(checkout, "-n", STAMP, "TORCH_INDEX=https://wheels.example").stdout

    assert "--index-url" not in ordinary
    assert "with CUDA: 2.7 GB to fetch" in ordinary
    assert "--no-deps --index-url https://wheels.example torch" in named
    assert "CUDA" not in named


def test_install_and_uninstall_are_about_the_same_places(checkout: Path) -> None:
    installed = make(checkout, "-n", "install", "PREFIX=/somewhere").stdout
    removed = make(checkout, "-n", "uninstall", "PREFIX=/somewhere").stdout

    assert "ln -sf /somewhere/share/loci-server/bin/loci /somewhere/bin/loci" in installed
    assert "rm -rf /somewhere/share/loci-server" in removed
    assert "rm -f /somewhere/bin/loci" in removed
