"""Cores and memory of machines laid out as files: bare, and in containers of both kinds."""

import os
from pathlib import Path

import pytest

from bitnet import machine

GIB = 2**30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


MEMINFO = "MemTotal: 25165824 kB\nMemAvailable: 16777216 kB"


def test_a_bare_machine(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user.slice"})
    assert machine.available_memory(root) == 16 * GIB
    assert machine.cpu_quota(root) is None
    assert machine.usable_cores(root) == len(os.sched_getaffinity(0))


def test_no_files_at_all(tmp_path: Path) -> None:
    assert machine.available_memory(tmp_path) is None
    assert machine.cpu_quota(tmp_path) is None
    assert machine.usable_cores(tmp_path) >= 1
    assert machine.load(tmp_path) is None
    assert machine.huge_pages(tmp_path) is None
    assert machine.stolen(tmp_path) == (0, 0)


def test_version_2_takes_the_tightest_group_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/outer/inner",
            f"{group}/outer/memory.max": 4 * GIB,
            f"{group}/outer/memory.current": 2 * GIB,
            f"{group}/outer/memory.stat": f"anon {GIB}\nactive_file {GIB // 4}\ninactive_file {GIB // 4}",
            f"{group}/outer/cpu.max": "150000 100000",
            f"{group}/outer/inner/memory.max": "max",
            f"{group}/outer/inner/memory.current": GIB,
            f"{group}/outer/inner/cpu.max": "max 100000",
        },
    )
    assert machine.available_memory(root) == 2.5 * GIB
    assert machine.cpu_quota(root) == 1.5
    assert machine.usable_cores(root) == min(2, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("visible", [True, False], ids=["host-tree", "own-tree"])
def test_version_1(tmp_path: Path, controllers: str, visible: bool) -> None:
    """Inside a container the path that the kernel names does not exist below the mount."""
    inner = "docker/abc/" if visible else ""
    memory, cpu = f"sys/fs/cgroup/memory/{inner}", f"sys/fs/cgroup/{controllers}/{inner}"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": f"4:memory:/docker/abc\n1:{controllers}:/docker/abc\n0::/",
            f"{memory}memory.limit_in_bytes": 3 * GIB,
            f"{memory}memory.usage_in_bytes": 2 * GIB,
            f"{memory}memory.stat": f"active_file 1\ntotal_active_file {GIB // 2}\ntotal_inactive_file 0",
            f"{cpu}cpu.cfs_quota_us": 50000,
            f"{cpu}cpu.cfs_period_us": 100000,
            "sys/fs/cgroup/memory/memory.dummy": 0,
        },
    )
    assert machine.available_memory(root) == 1.5 * GIB
    assert machine.cpu_quota(root) == 0.5
    assert machine.usable_cores(root) == 1


def test_version_1_without_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/\n1:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    )
    assert machine.available_memory(root) == 16 * GIB
    assert machine.cpu_quota(root) is None


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    root = write(
        tmp_path,
        {"proc/self/cgroup": "0::/", f"{group}/memory.max": GIB, f"{group}/memory.current": GIB + 4096},
    )
    assert machine.available_memory(root) == 0


def test_the_other_facts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/loadavg": "3.50 2.00 1.00 5/200 4242",
            "proc/stat": "cpu  10 0 20 60 0 0 0 10 0 0\ncpu0 1 2",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        },
    )
    assert machine.load(root) == 3.5
    assert machine.huge_pages(root) == "madvise"
    assert machine.stolen(root) == (10, 100)


def test_memory_of_this_process(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/statm": "5000 300 20 1 0 4000 0"})
    assert machine.resident_memory(root) == 300 * os.sysconf("SC_PAGE_SIZE")
    assert machine.resident_memory(tmp_path / "elsewhere") == 0
    machine.give_back_memory()  # whatever the C library: no error


def test_this_machine() -> None:
    available = machine.available_memory()
    if available is None:
        pytest.skip("this system does not tell")
    assert 0 < available < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
