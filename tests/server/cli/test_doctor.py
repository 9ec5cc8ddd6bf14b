"""`loci doctor` says what a machine lacks; of its kernels, tests/deploy/test_installation.py says more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.distribution import DISTRIBUTION, required_packages, version_of
from memory.hardware.detect import Gpu, HugePages, detect
from server.cli import doctor
from server.cli.doctor import Finding
from tests.server.harness import ROOT, TINY, invoke, run

GPU = Gpu(0, "a GPU", 24 << 30, (8, 9))


def findings_on(
    monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, has_driver: bool, **versions: str | None
) -> list[Finding]:
    """What doctor finds about GPUs' software on a machine that this one is not."""
    known = version_of
    monkeypatch.setattr(
        doctor, "version_of", lambda name: versions[name] if name in versions else known(name)
    )
    monkeypatch.setattr("memory.hardware.detect.has_nvidia_driver", lambda: has_driver)
    return list(doctor._gpu_software(replace(detect(), gpus=gpus)))


def test_a_driver_beside_pytorch_for_processors_is_no_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = findings_on(monkeypatch, has_driver=True, torch="2.13.0+cpu")

    assert found.verdict == "note"
    assert "make serve TORCH_INDEX=" in found.advice


def test_a_driver_that_shows_no_gpu_is_no_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = findings_on(monkeypatch, has_driver=True, torch="2.13.0")

    assert found.verdict == "note"
    assert "nvidia-smi" in found.advice


def test_a_machine_without_a_driver_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = findings_on(monkeypatch, has_driver=False, torch="2.13.0+cpu")

    assert found.verdict == "ok"


def test_a_gpu_without_triton_is_no_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = findings_on(monkeypatch, GPU, has_driver=True, triton=None)

    assert found.verdict == "note"
    assert "triton" in found.advice
    assert findings_on(monkeypatch, GPU, has_driver=True, triton="3.7.1") == []


def test_huge_pages_that_are_refused_or_set_aside_are_told() -> None:
    assert [found.verdict for found in doctor._huge_pages(HugePages("madvise"))] == ["ok"]
    refused, reserved = doctor._huge_pages(HugePages("never", 64 << 30))
    assert "echo madvise" in refused.advice
    assert "vm.nr_hugepages=0" in reserved.advice


@pytest.mark.parametrize("package", ["torch", "llguidance", "pydantic-settings"])
def test_any_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == package else "1.0")
    (found,) = doctor._packages()

    assert package in required_packages()
    assert found.verdict == "missing"
    assert f"pip install {package}" in found.advice


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "typer", "psutil", "pydantic"])
def test_doctor_speaks_where_a_package_cannot_be_imported(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError({module!r} + ' is not there')")
    path = f"{tmp_path}:{ROOT}"

    result = run("doctor", PYTHONPATH=path)
    other = run("info", TINY, PYTHONPATH=path)

    assert (result.returncode, other.returncode) == (1, 1)
    assert f"{module} is not there" in result.stdout
    assert "make serve" in result.stdout
    assert other.stderr == (
        f"loci: {module} is not there; `loci doctor` says what is missing and what to do about it\n"
    )


def test_the_version_is_that_of_locis_own_package() -> None:
    found = invoke("--version")

    assert found.stdout == f"loci {version_of(DISTRIBUTION)}\n"
