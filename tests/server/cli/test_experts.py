"""--experts at the command line: planned, described, run, and refused before anything is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.serving.service import prepare
from server.settings import resolve_settings
from tests.engine.families.golden_families import family_path
from tests.hub import Hub, files_of
from tests.server import harness
from tests.server.harness import invoke

RUN = ("Hello", "--max-tokens", "4", "--temperature", "0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loci" / "experts"


def test_info_describes_experts_in_the_format_asked_for(cache: Path) -> None:
    model = family_path("qwen3_moe_fp8")
    stored, encoded = (invoke("info", model, "--no-load", *flags) for flags in ((), ("--experts", "nf4")))
    experts = [
        next(line.split() for line in result.stdout.splitlines() if line.startswith("routed_experts"))
        for result in (stored, encoded)
    ]
    assert experts[0][1].startswith("fp8")
    assert experts[1][1] == "nf4"
    assert int(experts[1][-6]) < 0.6 * int(experts[0][-6])
    assert not cache.exists()


def test_the_server_takes_the_setting_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCI_EXPERTS", "int4")
    settings = resolve_settings({"model": family_path("qwen3_moe_fp8")})
    formats = {part.format for part in prepare(settings).opened.components if part.kind == "routed_experts"}
    assert formats == {"int4_32"}


@pytest.mark.slow
def test_a_model_of_the_hub_is_run_with_its_experts_encoded(
    hub: Hub, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("org/moe", files_of(family_path("qwen3_moe_fp8")))
    planned = [invoke("plan", "org/moe", "--json", *flags) for flags in ((), ("--experts", "mxfp4"))]
    stored, encoded = (json.loads(result.stdout)["model_bytes"] for result in planned)
    assert encoded < stored

    answers = [invoke("run", "org/moe", *RUN, "--experts", "mxfp4") for _ in range(2)]

    assert [answer.returncode for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout
    assert caplog.text.count("encoding routed experts as mxfp4, once: ") == 1
    (folder,) = cache.iterdir()
    assert folder.name.startswith("org--moe-mxfp4-")

    removed = invoke("rm", "org/moe", "--yes")

    assert removed.returncode == 0
    assert removed.stdout.splitlines()[-1].startswith("Removed its experts in other formats too, ")
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_what_cannot_be_encoded_is_not_downloaded(hub: Hub) -> None:
    hub.add("org/oss", files_of(family_path("gpt_oss")))
    said = harness.complaint(invoke("run", "org/oss", *RUN, "--experts", "nf4").stderr)
    assert "the routed experts are mxfp4 already" in said
    assert "Nothing was downloaded." in said
