"""`loci plan` and `loci bench hardware`, as people and scripts use them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from memory.experts.traces import RoutingTrace
from memory.hardware import measure
from memory.hardware.detect import detect
from memory.hardware.profiles import shipped
from memory.hardware.this_machine import Result, cache_path, disk_of, write_results
from memory.planner.calibration import Learned
from memory.planner.placement import OF_SEQUENCES
from server.cli.bench import hardware as cli_bench_hardware
from tests.conftest import golden_path
from tests.server.harness import invoke

FLASH = "deepseek-v4.1-flash"


def planned(*arguments: str) -> dict[str, Any]:
    result = invoke("plan", *arguments, "--json")
    assert result.returncode in (0, 3), result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_a_plan_a_person_would_buy_hardware_by() -> None:
    result = invoke("plan", FLASH, "--hardware", "2x4090-256g", "--context", "32768", "--batch", "8")
    assert result.returncode == 0
    text = result.stdout
    assert f"{FLASH} on 2x4090-256g: fits" in text
    for part in ("embedding", "dense", "shared experts", "kv", "head", "routed experts", "engram"):
        assert f"\n{part} " in text
    for tier in ("vram:0", "vram:1", "dram", "nvme"):
        assert f"\n{tier} " in text
    assert "decode, 1 sequence" in text
    assert "decode, 8 together" in text
    assert "What twice as much would bring" in text
    assert "uniform: every expert equally likely: the worst case" in text
    assert re.search(r"GPUs start \d+( to \d+)? kernels a layer, .* is a forecast", text)


@pytest.mark.slow
@pytest.mark.parametrize("hardware", [name for name in shipped() if name != "cpu-24g"])
@pytest.mark.parametrize("model", [FLASH, "deepseek-v4-flash", "deepseek-v3.2", "deepseek-v3"])
def test_every_named_model_is_planned_on_every_shipped_profile(model: str, hardware: str) -> None:
    report = planned(model, "--hardware", hardware)
    assert report["fits"]
    placed = sum(place["nbytes"] for place in report["places"] if place["kind"] not in OF_SEQUENCES)
    assert placed == report["model_bytes"]
    for tier in report["tiers"].values():
        assert tier["used_bytes"] <= tier["budget_bytes"]
    for forecast in report["forecasts"]:
        for step in ("decode_alone", "decode_together", "prefill"):
            assert forecast[step]["tokens_per_s"] > 0
            assert forecast[step]["bound"] in forecast[step]["seconds"]


def test_json_says_where_each_layers_experts_are() -> None:
    report = planned(FLASH, "--hardware", "4090-128g")
    experts = [place for place in report["places"] if place["kind"] == "routed_experts"]
    for layer in range(40):
        held = {place["tier"]: place["count"] for place in experts if place["layer"] == layer}
        assert held.keys() == {"vram:0", "dram", "nvme"}
        assert sum(held.values()) == 384
    assert {gain["resource"] for gain in report["doubling"]} >= {"VRAM size", "DRAM bandwidth", "disk speed"}


def test_a_model_on_this_machine_is_planned_with_the_rates_of_its_own_disk() -> None:
    model = golden_path("v41-c")
    for disk, is_assumed in ((disk_of(model), False), (disk_of(model) + 1, True)):
        write_results(cache_path(), detect(), [Result("disk_read", 3.0, "GB/s")], disk)
        text = invoke("plan", str(model), "--hardware", "this").stdout
        assert ("sequential disk reads" in text) == is_assumed


def test_every_layer_is_shown_when_asked_for() -> None:
    result = invoke("plan", FLASH, "--hardware", "4090-128g", "--layers")
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("routed experts")]
    assert [line[2] for line in lines if "nvme" in line] == [str(n) for n in range(40)]


def test_what_does_not_fit_is_said_with_a_remedy_and_an_exit_code() -> None:
    result = invoke("plan", "deepseek-v3.2", "--hardware", "cpu-24g")
    assert result.returncode == 3
    assert "deepseek-v3.2 on cpu-24g: does not fit" in result.stdout
    assert "more free disk for the checkpoint" in result.stdout
    assert "more DRAM" in result.stdout
    report = planned("deepseek-v3.2", "--hardware", "cpu-24g")
    assert not report["fits"]
    assert report["remedy"]["required"]
    assert "forecasts" not in report


def test_a_checkpoint_is_planned_from_its_headers() -> None:
    report = planned(str(golden_path("v41-c")), "--context", "512", "--batch", "2")
    assert report["fits"]
    assert report["workload"] == {
        "context": 512,
        "sequences": 2,
        "prefill_chunk": 512,
        "kv_tokens": None,
        "weights_bytes": None,
        "prefix_bytes": 0,
        "draft_bytes": 0,
    }
    assert {place["tier"] for place in report["places"]} == {"dram"}


def test_a_plan_for_an_unmeasured_machine_says_what_it_assumed() -> None:
    cache_path().unlink(missing_ok=True)
    result = invoke("plan", str(golden_path("v41-c")))
    assert "Assumed, not measured:" in result.stdout
    assert "loci bench hardware" in result.stdout


def test_virtual_gpus_take_part_in_a_plan() -> None:
    devices = "virtual:100MB@1GB/s,virtual:100MB@1GB/s"
    report = planned(str(golden_path("v41-c")), "--devices", devices, "--context", "512")
    assert report["tiers"]["vram:1"]["budget_bytes"] == 100_000_000
    assert {place["tier"] for place in report["places"] if place["kind"] == "dense"} == {"vram:0", "vram:1"}


def test_a_plan_may_leave_out_gpus_and_part_of_their_memory() -> None:
    report = planned(FLASH, "--hardware", "2x4090-256g", "--devices", "cuda:16GiB")
    assert report["tiers"].keys() == {"vram:0", "dram", "nvme"}
    assert report["tiers"]["vram:0"]["budget_bytes"] == 16 << 30


def test_a_recorded_trace_adds_its_own_forecast(tmp_path: Path) -> None:
    file = tmp_path / "routing.safetensors"
    RoutingTrace(torch.arange(6).expand(10, 43, 6)).save(file)
    report = planned("deepseek-v4-flash", "--hardware", "4090-128g", "--trace", str(file))
    uniform, skewed, traced = report["forecasts"]
    assert traced["routing"] == "traced"
    assert traced["decode_alone"]["hit_rates"]["vram"] == pytest.approx(1.0)
    assert traced["decode_alone"]["tokens_per_s"] > skewed["decode_alone"]["tokens_per_s"]
    assert skewed["decode_alone"]["tokens_per_s"] > uniform["decode_alone"]["tokens_per_s"]


def test_dram_can_be_kept_from_a_model() -> None:
    tiers = planned(FLASH, "--hardware", "2x4090-256g", "--dram", "64GiB")["tiers"]
    assert 63 << 30 < tiers["dram"]["used_bytes"] <= tiers["dram"]["budget_bytes"] == 64 << 30


def test_own_hardware_is_read_from_a_file(tmp_path: Path) -> None:
    source = Path(measure.__file__).parent / "shipped" / "4090-128g.toml"
    own = tmp_path / "mine.toml"
    own.write_text(source.read_text().replace("4090-128g", "mine"))
    assert planned(FLASH, "--hardware", str(own))["hardware"] == "mine"
    own.write_text(own.read_text().replace("[disk]", "[disk]\nrpm = 7200"))
    result = invoke("plan", FLASH, "--hardware", str(own))
    assert result.returncode == 1
    assert "disk.rpm: no such key" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("deepseek-v99",), "no such file or directory, and not one of"),
        ((FLASH, "--hardware", "abacus"), "unknown hardware profile"),
        ((FLASH, "--hardware", "4090-128g", "--context", "2000000"), "1048576 tokens"),
        ((FLASH, "--hardware", "4090-128g", "--devices", "virtual"), "virtual:24GiB@12.5GB/s"),
        ((FLASH, "--hardware", "4090-128g", "--devices", "cuda:30GiB"), "GPU 0 of 4090-128g has"),
        ((FLASH, "--hardware", "4090-128g", "--dram", "much"), "24GiB or 12.5GB"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: tuple[str, ...], complaint: str) -> None:
    result = invoke("plan", *arguments)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_measurements_are_kept_for_the_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DOUBT", 0)  # however busy this machine is now
    monkeypatch.setattr(measure, "working_bytes", lambda: 16 << 20)
    monkeypatch.setattr(measure, "EXPERT_HIDDEN", 256)
    monkeypatch.setattr(measure, "EXPERT_WIDTH", 128)
    monkeypatch.setattr(measure, "RANDOM_SECONDS", 0.02)
    monkeypatch.setattr(cli_bench_hardware, "DISK_BYTES", 16 << 20)
    out = tmp_path / "out.json"
    result = invoke("bench", "hardware", "--json", out, "--directory", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(out.read_text()) == json.loads(cache_path().read_text())
    assert "dram_read" in result.stdout
    plan = planned(str(golden_path("v41-c")))
    assert not any("DRAM" in line for line in plan["assumed"])
    cache_path().unlink()


def test_experts_are_planned_in_the_format_that_they_will_be_encoded_to() -> None:
    name, hardware = "qwen3-30b-a3b", ("--hardware", "4090-128g")
    released, encoded = planned(name, *hardware), planned(name, "--experts", "nf4", *hardware)
    experts = 48 * 128 * 3 * 2048 * 768
    assert released["model_bytes"] - encoded["model_bytes"] == experts * 2 - experts // 2 - experts // 64 * 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("gpt-oss-20b", "--experts", "nf4"), "routed experts are mxfp4 already"),
        (("kimi-k2-thinking", "--experts", "int4"), "routed experts are int4_32 already"),
        ((FLASH, "--experts", "nf4"), "is planned as released only"),
        (("smollm2", "--experts", "mxfp4"), "has no routed experts"),
    ],
)
def test_experts_that_are_not_encoded_are_not_planned_so(arguments: tuple[str, ...], complaint: str) -> None:
    refused = invoke("plan", *arguments, "--hardware", "4090-128g")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert complaint in refused.stderr


def test_a_budget_buys_a_machine_which_is_then_planned_and_priced(tmp_path: Path) -> None:
    saved = tmp_path / "machine.toml"
    bought = invoke("plan", "deepseek-v4-flash", "--budget", "3000", "--own", "RTX 4090=2", "--save", saved)
    assert bought.returncode == 0, bought.stderr
    assert re.search(r"^Buy for [\d,]+ USD: [\d.]+ tokens/s for one answer", bought.stdout, re.MULTILINE)
    assert re.search(r"^\d x RTX 4090, \d of them yours +0 ", bought.stdout, re.MULTILINE)
    assert re.search(r"^runner-up 1 +[\d.]+ ", bought.stdout, re.MULTILINE)
    assert re.search(r"500 more", bought.stdout)
    assert "deepseek-v4-flash on these parts: fits" in bought.stdout
    assert "check before buying" in bought.stdout

    priced = invoke("plan", "deepseek-v4-flash", "--hardware", saved, "--economics")
    assert priced.returncode == 0, priced.stderr
    assert "(the profile: a list of parts; watts assumed" in priced.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget", "-1"), "-1 is no amount of money"),
        (("--budget", "4000", "--own", "RTX 9999=1"), "no part is called 'RTX 9999'; known: RTX 3090"),
        (("--budget", "4000", "--own", "RTX 4090"), "expected a part and how many"),
        (("--budget", "4000", "--parts", "none.toml"), "none.toml: cannot be read"),
        (("--budget", "4000", "--economics"), "one after the other, with --save and --hardware"),
        (("--own", "RTX 4090=2"), "--own: says what --budget may buy; give --budget too"),
        (("--budget", "4000", "--hardware", "this"), "--hardware: names a machine, but --budget buys one"),
        (("--budget", "4000", "--devices", "cuda:1GiB"), "--devices: names a machine"),
        (("--budget", "4000", "--dram", "1GiB"), "--dram: names a machine"),
        (("--budget", "4000", "--prefill-chunk", "512"), "--prefill-chunk: is not for --budget"),
        (("--budget", "4000", "--layers"), "--layers: is not for --budget"),
        (("--budget", "4000", "--drafts"), "--drafts: is not for --budget"),
        (("--budget", "4000", "--plot", "costs.png"), "--plot: says what tokens cost; give --economics too"),
    ],
)
def test_what_cannot_be_bought_ends_with_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = invoke("plan", "deepseek-v4-flash", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--price", "0"), "--price: says what tokens cost; give --economics too"),
        (("--costs", "costs.toml"), "--costs: says what tokens cost"),
        (("--prices", "prices.toml"), "--prices: says what tokens cost"),
        (("--against", "some API"), "--against: says what tokens cost"),
        (("--plot", "costs.png"), "--plot: says what tokens cost"),
        (("--economics", "--drafts"), "--economics and --drafts: one after the other"),
        (("--hardware", "4090-128g", "--layers"), "--layers: says something of one machine"),
        (("--dram", "1000GiB"), "--dram 1000GiB: 4090-128g has 131.0 GB of DRAM for models, but 1073.7 GB"),
    ],
)
def test_what_would_do_nothing_is_refused_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = invoke("plan", "deepseek-v4-flash", "--hardware", "4090-128g", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_trace_beside_what_was_measured_is_refused(tmp_path: Path) -> None:
    trace, measured = tmp_path / "routing.safetensors", tmp_path / "learned.json"
    RoutingTrace(torch.arange(6).expand(10, 43, 6)).save(trace)
    Learned("deepseek-v4-flash").write(measured)
    done = invoke("plan", "deepseek-v4-flash", "--trace", trace, "--measured", measured)
    assert done.returncode == 1
    assert "--trace and --measured: give one of them" in done.stderr


@pytest.mark.parametrize("instead", ["--economics", "--drafts"])
def test_what_does_not_fit_has_the_same_exit_code_whatever_was_asked(instead: str) -> None:
    done = invoke("plan", "deepseek-v3.2", "--hardware", "cpu-24g", instead)
    assert done.returncode == 3
    assert f"deepseek-v3.2 does not fit on cpu-24g; without {instead}, its plan says why" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_budget_that_buys_nothing_that_fits_says_what_does() -> None:
    done = invoke("plan", "deepseek-v4.1-flash", "--budget", "2000")
    assert done.returncode == 3
    assert "for 2,000 USD can hold deepseek-v4.1-flash; for 2," in done.stdout


def test_drafts_are_planned_with_what_is_assumed() -> None:
    done = invoke("plan", "deepseek-v4.1-flash", "--hardware", "2x4090-256g", "--drafts")
    assert done.returncode == 0
    assert "assumed, not measured" in done.stdout
    asked = ("plan", "deepseek-v4.1-flash", "--hardware", "2x4090-256g", "--drafts", "--json")
    steps = json.loads(invoke(*asked).stdout)["steps"]
    assert [step["drafted"] for step in steps] == list(range(6))
    assert [step["tokens_a_step"] for step in steps] == sorted(step["tokens_a_step"] for step in steps)
    assert all(a["step_s"] < b["step_s"] for a, b in itertools.pairwise(steps))
