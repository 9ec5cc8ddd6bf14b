"""The wheel holds all that Loci needs: installed elsewhere, it answers from another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.distribution import DISTRIBUTION
from tests.server.harness import GOLDEN, ROOT, eventually

pytestmark = pytest.mark.slow

SOURCES = ("server", "engine", "memory", "quant", "deploy/demo/loci-demo")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def ran(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints; it must succeed. Neither this repository nor a Loci setting reaches it."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("LOCI_")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"} | variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that was built in them."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    project = folder / "pyproject.toml"
    assert '"-O3"' in project.read_text()
    project.write_text(project.read_text().replace('"-O3"', '"-O1"'))  # in half the time, and as well packed
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without network."""
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out)
    ran(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`loci` of an environment that holds the wheel alone and borrows what it requires from this one."""
    environment = tmp_path_factory.mktemp("environment")
    ran(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", wheel)
    ran(sys.executable, "-m", "pip", "--python", python, *install, cwd=environment)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "loci"


def test_the_wheel_is_named_so_that_no_other_package_is_meant(wheel: Path) -> None:
    assert wheel.name.startswith(DISTRIBUTION.replace("-", "_") + "-")


def test_the_wheel_holds_every_file_of_its_packages(wheel: Path, source: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    built_from = {"quant/kernels/cpu/native_src"}
    wanted = {
        str(path.relative_to(source))
        for room in ("server", "engine", "memory", "quant")
        for path in (source / room).rglob("*")
        if path.is_file() and str(path.parent.relative_to(source)) not in built_from
    }

    assert wanted - held == set()
    assert [name for name in held if name.startswith(("tests/", "deploy/"))] == []


def test_an_installed_loci_finds_its_kernels_its_model_and_its_packages(
    program: Path, tmp_path: Path
) -> None:
    report = ran(program, "doctor", cwd=tmp_path)

    verdict = "ok" if shutil.which("g++") else "note"
    assert re.search(rf"^{verdict} +kernels ", report, re.MULTILINE)
    assert str(program.parents[1] / "share" / "loci" / "loci-demo") in report
    assert "others Loci needs" in report


def test_an_installed_loci_runs_from_another_folder(program: Path, tmp_path: Path) -> None:
    model = shutil.copytree(GOLDEN / "v41-c", tmp_path / "model")

    assert "deepseek" in ran(program, "info", model.name, "--no-load", cwd=tmp_path).lower()
    greedy = ("--max-tokens", "16", "--temperature", "0")
    answer = ran(program, "run", "demo", "What is the capital of France?", *greedy, cwd=tmp_path)
    assert "The capital of France is Paris." in answer
    assert "2x4090-128g" in ran(program, "plan", model.name, "--hardware", "2x4090-128g", cwd=tmp_path)


@pytest.fixture
def url(program: Path, tmp_path: Path) -> Iterator[str]:
    """Where an installed `loci serve`, started in an empty folder, listens once it is ready."""
    printed = tmp_path / "printed"
    with printed.open("w") as out:
        server = subprocess.Popen(
            [program, "serve", "--port", "0"],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(
            lambda: "is ready" in printed.read_text() or server.poll() is not None, "the model is loaded"
        )
        assert server.poll() is None, printed.read_text()
        yield next(word for word in printed.read_text().split() if word.startswith("http://"))
    finally:
        server.kill()
        server.wait()


def test_an_installed_loci_serves_the_model_that_came_with_it(url: str) -> None:
    ask = {"model": "loci-demo", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=ask | {"temperature": 0}, timeout=60).json()

    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    page = httpx.get(f"{url}/", headers={"Accept": "text/html"})
    assert page.status_code == 200
    for name in ("main.js", "style.css"):
        assert name in page.text
    assert httpx.get(f"{url}/version").json()["version"] != "source"


def test_without_a_compiler_doctor_says_that_answers_are_slow_and_what_to_do(source: Path) -> None:
    report = ran(sys.executable, "-m", "server", "doctor", cwd=source)

    assert "note  kernels" in report
    assert "SLOW" in report
    assert "kernels: answers are many times slower" in report
    assert "apt-get install g++" in report
