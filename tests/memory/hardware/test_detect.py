"""What is detected of the machine; files of /sys are made up where a real one cannot be counted on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from memory.hardware.detect import (
    HugePages,
    PcieLink,
    _disks,
    _huge_pages,
    _pci_address,
    _pcie_link,
    available_memory_bytes,
    detect,
)


def test_the_machine_is_described() -> None:
    machine = detect()
    assert machine.cores >= 1
    assert machine.numa_nodes >= 1
    assert 0 < available_memory_bytes() <= machine.memory_bytes
    assert machine.available_bytes <= machine.memory_bytes


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_gpus_link_is_read_at_its_best_speed_and_present_width(tmp_path: Path) -> None:
    write(tmp_path / "0000:01:00.0" / "max_link_speed", "16.0 GT/s PCIe\n")
    write(tmp_path / "0000:01:00.0" / "current_link_speed", "2.5 GT/s PCIe\n")
    write(tmp_path / "0000:01:00.0" / "current_link_width", "8\n")
    assert _pcie_link("0000:01:00.0", tmp_path) == PcieLink(generation=4, lanes=8)
    assert _pcie_link("0000:02:00.0", tmp_path) is None
    assert _pcie_link("", tmp_path) is None


def test_links_are_as_fast_as_their_lanes() -> None:
    assert round(PcieLink(4, 16).usable_bytes_per_s / 1e9) == 25
    assert PcieLink(4, 8).usable_bytes_per_s == PcieLink(3, 16).usable_bytes_per_s


def test_a_gpus_address_is_written_as_the_system_does() -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    assert _pci_address(gpu) == "0000:c1:00.0"
    assert _pci_address(SimpleNamespace(name="old torch")) == ""


def test_huge_pages_are_as_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "transparent_hugepage").mkdir()
    (tmp_path / "transparent_hugepage" / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "meminfo").write_text("MemTotal: 24000000 kB\nHugePages_Total: 4\nHugetlb: 8192 kB\n")
    assert _huge_pages(tmp_path, tmp_path) == HugePages("madvise", 8 << 20)
    assert _huge_pages(tmp_path / "none", tmp_path / "none") == HugePages()


def test_drives_are_listed_without_those_that_hold_no_files(tmp_path: Path) -> None:
    write(tmp_path / "nvme0n1" / "size", "3907029168\n")
    write(tmp_path / "nvme0n1" / "device" / "model", "A Drive 2TB  \n")
    write(tmp_path / "nvme0n1" / "queue" / "rotational", "0\n")
    write(tmp_path / "sda" / "size", "7814037168\n")
    write(tmp_path / "sda" / "queue" / "rotational", "1\n")
    write(tmp_path / "loop0" / "size", "100\n")
    write(tmp_path / "sdb" / "size", "0\n")
    found = {disk.name: disk for disk in _disks(tmp_path)}
    assert found.keys() == {"nvme0n1", "sda"}
    assert found["nvme0n1"].model == "A Drive 2TB"
    assert found["nvme0n1"].nbytes == 3907029168 * 512
    assert [found[name].is_rotational for name in ("nvme0n1", "sda")] == [False, True]
