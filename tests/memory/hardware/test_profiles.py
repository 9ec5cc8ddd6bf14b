"""Hardware profiles: those shipped, files of one's own, and devices given on the command line."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from memory.hardware.profile_text import profile_toml
from memory.hardware.profiles import (
    DeviceSpec,
    MachineCosts,
    load_profile,
    parse_bytes,
    parse_devices,
    parse_profile,
    shipped,
)
from quant.errors import ConfigError
from tests.memory.planner.hardware_strategies import GB, MACHINE

OWN = """
name = "mine"
[cpu]
cores = 8
level = "avx2"
matmul_gflops = 400
[dram]
size_gib = 64
reserved_gib = 4
read_gb_per_s = 45
[disk]
free_gb = 900
read_gb_per_s = 3.5
random_reads_per_s = 300000
[[gpu]]
name = "RTX 3090"
memory_gib = 24
memory_gb_per_s = 936
matmul_tflops = 71
link_gb_per_s = 25
"""


def test_the_promised_profiles_are_shipped() -> None:
    assert set(shipped()) == {"2x4090-128g", "2x4090-256g", "4090-128g", "5090-256g", "cpu-24g"}


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_profile_reads_and_is_called_what_its_file_is(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert profile.assumed == ()


def test_shipped_gpus_and_memory_are_those_of_their_names() -> None:
    two, small = load_profile("2x4090-256g"), load_profile("cpu-24g")
    assert [gpu.name for gpu in two.gpus] == ["RTX 4090", "RTX 4090"]
    assert 240 << 30 < two.dram_bytes < 256 << 30
    assert small.gpus == ()


def test_a_profile_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    profile = load_profile(str(path))
    assert profile.dram_bytes == 60 << 30
    assert profile.gpus[0].link_together_bytes_per_s == 25e9
    assert profile.expert_bytes_per_s is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("cores = 8", "cores = 8\nturbo = true"), r"cpu\.turbo: no such key"),
        (("cores = 8", 'cores = "eight"'), r"cpu\.cores: .*integer.*'eight'"),
        (("cores = 8", "cores = 8.5"), r"cpu\.cores"),
        (('level = "avx2"', 'level = "sse"'), r"cpu\.level"),
        (("matmul_gflops = 400", ""), r"cpu\.matmul_gflops: missing"),
        (("size_gib = 64", "size_gib = -1"), r"dram\.size_gib"),
        (("size_gib = 64", "size_gib = nan"), r"dram\.size_gib"),
        (("size_gib = 64", "size_gib = true"), r"dram\.size_gib"),
        (("reserved_gib = 4", "reserved_gib = 64"), r"dram: 64\.0 GiB of 64\.0 GiB is reserved"),
        (("link_gb_per_s = 25", "link_gb_per_s = 25\nsli = 1"), r"gpu\.0\.sli: no such key"),
        (("[dram]", "[[dram]]"), r"dram: must be a section of its own, \[dram\]"),
        (('name = "mine"', 'name = "mine'), r"not TOML"),
    ],
)
def test_a_wrong_profile_is_refused_by_key(change: tuple[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_profile(OWN.replace(*change), "mine.toml")


def test_all_problems_of_a_profile_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"cpu\.cores.*dram\.speed"):
        parse_profile(
            OWN.replace("cores = 8", "cores = 0").replace("[dram]", "[dram]\nspeed = 1"), "mine.toml"
        )


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"8x5090.*2x4090-128g.*this"):
        load_profile("8x5090")


def test_the_documented_profile_reads() -> None:
    page = (Path(__file__).parents[3] / "docs" / "planner.md").read_text()
    example = page.split("```toml")[1].split("```")[0]
    assert tomllib.loads(example).keys() >= {"name", "cpu", "dram", "disk", "gpu"}
    parse_profile(example, "docs/planner.md")


def test_profiles_are_part_of_the_package() -> None:
    folder = files("memory") / "hardware" / "shipped"
    assert all(entry.name.endswith(".toml") for entry in folder.iterdir())


def test_devices_are_read_with_budget_and_link() -> None:
    assert parse_devices("virtual:24GiB@12.5GB/s, virtual:512MB,cuda:20GiB") == (
        DeviceSpec("virtual", 0, 24 << 30, 12_500_000_000),
        DeviceSpec("virtual", 1, 512_000_000, None),
        DeviceSpec("cuda", 0, 20 << 30, None),
    )


def test_a_gpu_named_by_number_is_told_how_gpus_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'cuda:0'.*like cuda:20GiB; GPUs are used in order"):
        parse_devices("cuda:0")


@pytest.mark.parametrize(
    "text", ["", "virtual", "tpu:4GB", "virtual:", "virtual:lots", "virtual:4GB@5GB", "virtual:4GB@/s",
             "cuda:4GB@5GB/s", "virtual:0", "virtual:-4GB", "virtual:nanGB", "virtual:4GB,,virtual:4GB"],
)  # fmt: skip
def test_wrong_devices_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected|real GPU|plausible"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GiB", 24 << 30), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("2tb", 2 * 10**12)]
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


def test_virtual_gpus_take_their_memory_from_dram() -> None:
    machine = MACHINE.with_devices(parse_devices("virtual:2GB@5GB/s,virtual:3GB"))
    assert machine.dram_bytes == MACHINE.dram_bytes - 5 * GB
    assert [gpu.kind for gpu in machine.gpus] == ["virtual", "virtual"]
    assert [gpu.link_bytes_per_s for gpu in machine.gpus] == [5e9, MACHINE.dram_bytes_per_s]


def test_real_gpus_are_the_profiles_as_large_as_their_budgets() -> None:
    machine = load_profile("2x4090-256g")
    both = machine.with_devices(parse_devices("cuda:20GiB,cuda:22GiB"))
    assert [gpu.memory_bytes >> 30 for gpu in both.gpus] == [20, 22]
    assert both.gpus == tuple(
        replace(of, memory_bytes=gpu.memory_bytes) for of, gpu in zip(machine.gpus, both.gpus, strict=True)
    )
    assert both.dram_bytes == machine.dram_bytes


def test_a_gpu_by_itself_has_its_link_for_itself() -> None:
    machine = load_profile("2x4090-256g")
    shared = replace(machine.gpus[0], link_together_bytes_per_s=machine.gpus[0].link_bytes_per_s / 2)
    machine = replace(machine, gpus=(shared, shared))
    (one,) = machine.with_devices(parse_devices("cuda:20GiB")).gpus
    two = machine.with_devices(parse_devices("cuda:20GiB,cuda:20GiB")).gpus
    assert one.link_together_bytes_per_s == shared.link_bytes_per_s
    assert two[0].link_together_bytes_per_s == shared.link_together_bytes_per_s


def test_real_and_virtual_gpus_stand_in_the_order_asked_for() -> None:
    machine = load_profile("2x4090-256g").with_devices(parse_devices("virtual:2GB,cuda:20GiB"))
    assert [gpu.kind for gpu in machine.gpus] == ["virtual", "cuda"]
    assert machine.dram_bytes == load_profile("2x4090-256g").dram_bytes - 2 * GB


@pytest.mark.parametrize(
    ("devices", "complaint"),
    [
        ("cuda:20GiB,cuda:20GiB,cuda:20GiB", r"no GPU 2 in 2x4090-256g; it has 2"),
        ("cuda:30GiB", r"GPU 0 of 2x4090-256g has 2\d\.\d GB for models, but 32\.2 GB was requested"),
    ],
)
def test_gpus_that_a_machine_does_not_have_are_refused(devices: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_profile("2x4090-256g").with_devices(parse_devices(devices))


IMPOSSIBLE = {
    "a link of 25 GB/s is impossible: PCIe 4.0 x8 carries 15.76 GB/s": (
        "link_gb_per_s = 12.5\npcie",
        "link_gb_per_s = 25\npcie",
    ),
    "a disk of 14 GB/s is impossible: PCIe 4.0 x4 carries 7.88 GB/s": (
        "read_gb_per_s = 7\n",
        "read_gb_per_s = 14\n",
    ),
    "a disk with 2,000,000 random reads a second of 8.192 GB/s is impossible: PCIe 4.0 x4 carries": (
        "random_reads_per_s = 800_000",
        "random_reads_per_s = 2_000_000",
    ),
    "90 GB/s of DRAM is impossible: 2 channel(s) of 5200 MT/s carry 83.2 GB/s": (
        "read_gb_per_s = 70 ",
        "read_gb_per_s = 90 ",
    ),
    "no processor has a faster link to a GPU than 450 GB/s": (
        'link_gb_per_s = 12.5\npcie = "4.0 x8"',
        "link_gb_per_s = 900",
    ),
    "disk.pcie: '4 lanes' is not a PCI Express link; expected something like '4.0 x8'": (
        'pcie = "4.0 x4"',
        'pcie = "4 lanes"',
    ),
}


@pytest.mark.parametrize("says", IMPOSSIBLE)
def test_rates_that_no_wire_carries_are_refused_by_name(says: str) -> None:
    text = (files("memory.hardware") / "shipped" / "2x4090-256g.toml").read_text()
    old, new = IMPOSSIBLE[says]
    assert old in text

    with pytest.raises(ConfigError, match=re.escape(says)) as refused:
        parse_profile(text.replace(old, new, 1), "mine.toml")
    assert str(refused.value).startswith("mine.toml: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", shipped())
def test_a_written_profile_is_the_machine(name: str) -> None:
    costs = MachineCosts(1234.5, 90.0, 700.0, "EUR", 'a "quote" of 🐟, é and \x7f')
    profile = replace(load_profile(name), costs=costs, cpu_fp8_flops=178e9, rearranged_per_core=5.6e9)

    assert parse_profile(profile_toml(profile), "written") == profile
