"""What a machine's wires can carry at most: a profile that claims more is refused.

A rate is held against the lanes or channels that the profile states, or else against the fastest that are
built into any machine.
"""

from __future__ import annotations

import re

from memory.hardware.detect import PcieLink
from quant.errors import ConfigError

CHANNEL_BYTES = 8  # of a DDR channel, each transfer
READ_BYTES = 4096  # of a random read
# The fastest links that a processor has to a GPU (NVLink-C2C, one way), memory of two sockets, and a board
# full of drives: beyond that a figure is a mistake.
FASTEST_LINK, MOST_DRAM, MOST_DISKS = 450e9, 2000e9, 128e9

_PCIE = re.compile(r"([1-7])(?:\.0)? ?x(1|2|4|8|16|32)")


def pcie_link(text: str) -> PcieLink:
    """A link as people write it: `4.0 x8`. Raises ValueError."""
    found = _PCIE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a PCI Express link; expected something like '4.0 x8'")
    return PcieLink(int(found[1]), int(found[2]))


def dram_peak(channels: int, mt_per_s: float) -> float:
    """Bytes a second on the wires of so many channels, at so many million transfers a second."""
    return channels * CHANNEL_BYTES * mt_per_s * 1e6


def check_link(where: str, bytes_per_s: float, link: PcieLink | None) -> None:
    """Refuse a link to a GPU that is faster than its lanes. Raises ConfigError naming it."""
    _check(where, "a link", bytes_per_s, link, FASTEST_LINK, "no processor has a faster link to a GPU than")


def check_disk(where: str, bytes_per_s: float, reads_per_s: float, link: PcieLink | None) -> None:
    """Refuse a disk that is faster than its lanes, in sequence or at random. Raises ConfigError naming it."""
    at_random = f"a disk with {reads_per_s:,.0f} random reads a second"
    for what, rate in (("a disk", bytes_per_s), (at_random, reads_per_s * READ_BYTES)):
        _check(where, what, rate, link, MOST_DISKS, "no board's drives are faster together than")


def check_dram(where: str, bytes_per_s: float, channels: int | None, mt_per_s: float | None) -> None:
    """Refuse memory that is faster than its channels. Raises ConfigError naming it."""
    if channels is None or mt_per_s is None:
        if bytes_per_s > MOST_DRAM:
            raise ConfigError(
                f"{where}: {_rate(bytes_per_s)} of DRAM is impossible: no machine's memory is faster than "
                f"{_rate(MOST_DRAM)}"
            )
        return
    peak = dram_peak(channels, mt_per_s)
    if bytes_per_s > peak:
        raise ConfigError(
            f"{where}: {_rate(bytes_per_s)} of DRAM is impossible: {channels} channel(s) of {mt_per_s:g} "
            f"MT/s carry {_rate(peak)}"
        )


def _check(where: str, what: str, bytes_per_s: float, link: PcieLink | None, most: float, why: str) -> None:
    if link is None:
        if bytes_per_s > most:
            raise ConfigError(f"{where}: {what} of {_rate(bytes_per_s)} is impossible: {why} {_rate(most)}")
    elif bytes_per_s > link.peak_bytes_per_s:
        raise ConfigError(
            f"{where}: {what} of {_rate(bytes_per_s)} is impossible: PCIe {link.generation}.0 x{link.lanes} "
            f"carries {_rate(link.peak_bytes_per_s)}"
        )


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.4g} GB/s"
