"""Control groups above a process limit it like its own; the files of /proc and /sys are made up."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.hardware.control_groups import Read, cpu_quota, memory_groups, whole_cores

GB = 1_000_000_000
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "35 31 0:31 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
V1_CPU = "33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
HYBRID_V2 = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def machine(groups: str, mounts: str, files: Mapping[str, object]) -> Read:
    """Reads of a machine that has these files below /sys/fs/cgroup, and no others."""
    texts = {"/proc/self/cgroup": groups, "/proc/self/mountinfo": mounts}
    texts |= {f"/sys/fs/cgroup/{name}": f"{content}\n" for name, content in files.items()}
    return lambda path: texts.get(str(path), "")


def room(read: Read) -> int | None:
    return min((group.room_bytes for group in memory_groups(read)), default=None)


def v2(**sizes: tuple[object, int, int]) -> dict[str, object]:
    """Files of groups by name (`_` for `/`, `top` the highest): limit, bytes used, bytes of files in them."""
    files: dict[str, object] = {}
    for name, (limit, used, of_files) in sizes.items():
        place = "" if name == "top" else name.replace("_", "/") + "/"
        files[f"{place}memory.max"] = limit
        files[f"{place}memory.current"] = used
        files[f"{place}memory.stat"] = f"anon 1\ninactive_file {of_files}"
    return files


def test_the_group_with_the_least_room_counts_not_the_one_with_the_lowest_limit() -> None:
    files = v2(outer=(16 * GB, 15_500_000_000, 0), outer_inner=(8 * GB, 200_000_000, 0))

    assert room(machine("0::/outer/inner", V2, files)) == GB // 2


def test_a_group_far_above_limits_too() -> None:
    files = v2(a=(4 * GB, 3 * GB, 0), a_b=("max", 2 * GB, 0), a_b_c=(3 * GB, GB, 0))

    assert room(machine("0::/a/b/c", V2, files)) == GB


def test_pages_of_files_are_given_back_on_demand() -> None:
    assert room(machine("0::/a", V2, v2(a=(4 * GB, 3 * GB, 2 * GB)))) == 3 * GB


def test_a_group_that_is_full_leaves_nothing() -> None:
    assert room(machine("0::/a", V2, v2(a=(4 * GB, 5 * GB, 0)))) == 0


def test_a_process_is_slowed_down_from_the_high_mark_on() -> None:
    files = v2(a=(4 * GB, GB, 0)) | {"a/memory.high": 3 * GB}

    assert room(machine("0::/a", V2, files)) == 2 * GB


def test_version_1_is_read_with_all_its_ancestors() -> None:
    groups = "5:cpuset:/\n4:memory:/outer/inner\n3:cpu,cpuacct:/outer\n1:name=systemd:/other"
    files = {
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": 30 * GB,
        "memory/outer/memory.limit_in_bytes": 16 * GB,
        "memory/outer/memory.usage_in_bytes": 15 * GB,
        "memory/outer/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB // 4}",
        "memory/outer/inner/memory.limit_in_bytes": 8 * GB,
        "memory/outer/inner/memory.usage_in_bytes": GB,
        "cpu,cpuacct/cpu.cfs_quota_us": -1,
        "cpu,cpuacct/cpu.cfs_period_us": 100_000,
        "cpu,cpuacct/outer/cpu.cfs_quota_us": 250_000,
        "cpu,cpuacct/outer/cpu.cfs_period_us": 100_000,
    }
    read = machine(groups, f"{V1_MEMORY}\n{V1_CPU}", files)

    assert room(read) == GB + GB // 4
    assert cpu_quota(read) == 2.5


def test_version_1_tells_of_limits_above_what_a_container_sees() -> None:
    files = {
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": GB,
        "memory/memory.stat": f"hierarchical_memory_limit {3 * GB}",
    }

    assert room(machine("4:memory:/docker/abc", V1_MEMORY, files)) == 2 * GB


def test_both_versions_count_where_both_are_mounted() -> None:
    groups = "4:memory:/a\n3:cpu,cpuacct:/a\n0::/b"
    files = {
        "memory/a/memory.limit_in_bytes": 8 * GB,
        "memory/a/memory.usage_in_bytes": GB,
        "cpu,cpuacct/a/cpu.cfs_quota_us": 400_000,
        "cpu,cpuacct/a/cpu.cfs_period_us": 100_000,
        "unified/b/memory.max": 3 * GB,
        "unified/b/memory.current": GB,
        "unified/b/cpu.max": "50000 100000",
    }
    read = machine(groups, f"{V1_MEMORY}\n{V1_CPU}\n{HYBRID_V2}", files)

    assert room(read) == 2 * GB
    assert cpu_quota(read) == 0.5


def test_a_container_is_mounted_below_the_hosts_groups() -> None:
    mount = V2.replace("0:26 / ", "0:26 /docker/abc ")
    files = v2(top=(4 * GB, GB, 0), job=(3 * GB, GB, 0))

    assert room(machine("0::/docker/abc/job", mount, files)) == 2 * GB
    assert room(machine("0::/docker/abc", mount, files)) == 3 * GB
    assert room(machine("0::/docker/abcdef", mount, files)) == 3 * GB
    assert room(machine("0::/../elsewhere", mount, files)) == 3 * GB


def test_control_groups_may_be_mounted_anywhere() -> None:
    read = machine("0::/a", V2.replace("/sys/fs/cgroup", "/run/groups"), {})
    files = {"/run/groups/a/memory.max": str(4 * GB), "/run/groups/a/memory.current": str(GB)}

    assert room(lambda path: files.get(str(path), "") or read(path)) == 3 * GB


@pytest.mark.parametrize(
    ("own", "above", "quota"),
    [
        ("max 100000", "max 100000", None),
        ("max 100000", "150000 100000", 1.5),
        ("200000 100000", "max 100000", 2.0),
        ("400000 100000", "300000 100000", 3.0),
        ("50000 25000", "300000 100000", 2.0),
        ("", "", None),
        ("0 100000", "what", None),
    ],
)
def test_processor_time_is_limited_by_every_group(own: str, above: str, quota: float | None) -> None:
    assert cpu_quota(machine("0::/a/b", V2, {"a/cpu.max": above, "a/b/cpu.max": own})) == quota


def test_a_machine_without_control_groups_limits_nothing() -> None:
    read = machine("", "", {})

    assert (memory_groups(read), cpu_quota(read)) == ([], None)


@given(st.lists(st.text(":/. -,0123abcegmoruxy\n"), min_size=3, max_size=3))
def test_files_that_are_written_otherwise_limit_nothing(texts: list[str]) -> None:
    groups, mounts, content = texts

    found = memory_groups(lambda path: {"cgroup": groups, "mountinfo": mounts}.get(path.name, content))

    assert all(group.room_bytes >= 0 for group in found)


@given(st.floats(0.01, 1000))
def test_threads_use_all_of_a_quota_and_less_than_one_more(quota: float) -> None:
    assert 1 <= whole_cores(quota) < quota + 1
