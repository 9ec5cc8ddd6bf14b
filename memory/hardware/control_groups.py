"""The memory and CPU time that Linux control groups allow this process.

The kernel charges what a process takes to its group and to every group above, so all of them are looked at:
the one with the least room counts, which need not be the one with the lowest limit. Both versions of control
groups are read, and machines that mount both. Whoever calls says how a file is read (`detect.py` does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# The text of a file; empty where it cannot be read.
Read = Callable[[Path], str]

USUAL_PLACE = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # version 1 writes a number near 2^63


@dataclass(frozen=True)
class MemoryGroup:
    """A control group that limits this process's memory."""

    limit_bytes: int
    used_bytes: int
    reclaimable_bytes: int

    @property
    def room_bytes(self) -> int:
        """What can still be taken: pages of files count as used, yet are given back on demand."""
        return max(0, self.limit_bytes - self.used_bytes + self.reclaimable_bytes)


def memory_groups(read: Read) -> list[MemoryGroup]:
    """The groups that limit this process's memory; none where nothing does."""
    found = (_memory_group(directory, read) for directory in _directories("memory", read))
    return [group for group in found if group is not None]


def cpu_quota(read: Read) -> float | None:
    """How many processors' time this process may take; None where nothing limits it."""
    quotas = (_cpu_quota(directory, read) for directory in _directories("cpu", read))
    return min((quota for quota in quotas if quota is not None), default=None)


def _directories(controller: str, read: Read) -> list[Path]:
    """Directories of this process's groups and of those above them, in each hierarchy with `controller`."""
    found: dict[Path, None] = {}
    for line in read(Path("/proc/self/cgroup")).splitlines():
        number, controllers, name = [*line.split(":", 2), "", ""][:3]
        if not number or not name:
            continue
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [*_mounts(controller if controllers else "", read), (USUAL_PLACE / controllers, "/")]
        for mount, root in mounts:
            own = _below(mount, root, PurePosixPath(name))
            found |= dict.fromkeys(d for d in (own, *own.parents) if d == mount or mount in d.parents)
    return list(found)


def _below(mount: Path, root: str, name: PurePosixPath) -> Path:
    """Where the group `name` lies where `root` is mounted on `mount`.

    Inside a container the name may be one outside of what is mounted; then that is all there is to see.
    """
    if ".." in name.parts or not name.is_relative_to(root):
        return mount
    return mount / name.relative_to(root)


def _mounts(controller: str, read: Read) -> Iterator[tuple[Path, str]]:
    """(where it is mounted, which group that is) for version 1 with `controller`, for version 2 without."""
    for line in read(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        is_version_1 = kinds[0] == "cgroup" and controller in kinds[2].split(",")
        if is_version_1 if controller else kinds[0] == "cgroup2":
            yield Path(fields[4]), fields[3]


def _memory_group(directory: Path, read: Read) -> MemoryGroup | None:
    pairs = (line.split(maxsplit=1) for line in read(directory / "memory.stat").splitlines())
    stat = dict(pair for pair in pairs if len(pair) == 2)
    limits = [
        # Beyond memory.high a process is slowed down until it hardly runs.
        *(read(directory / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")),
        stat.get("hierarchical_memory_limit", ""),
    ]
    limit = min((number for text in limits if (number := _number(text)) is not None), default=UNLIMITED)
    used = _number(read(directory / "memory.current") or read(directory / "memory.usage_in_bytes"))
    if used is None or limit >= UNLIMITED:
        return None
    reclaimable = _number(stat.get("total_inactive_file", stat.get("inactive_file", "")))
    return MemoryGroup(limit, used, reclaimable or 0)


def _cpu_quota(directory: Path, read: Read) -> float | None:
    both = read(directory / "cpu.max").split()
    if len(both) != 2:
        both = [read(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = map(_number, both)
    return quota / period if quota and period else None


def _number(text: str) -> int | None:
    """A number as it stands in such a file; None for `max`, -1 and nothing, which limit nothing."""
    return int(text) if text.strip().isdecimal() else None


def whole_cores(quota: float) -> int:
    """Threads to run within a quota: enough to use all of it, at least one."""
    return max(1, math.ceil(quota - 1e-6))
