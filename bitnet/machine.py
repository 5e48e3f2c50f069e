"""What this process may use of the machine: cores and memory, the limits of a container (control groups) included.

Linux tells both in files; `root` stands for `/`, so that tests can lay out a machine of their own. Elsewhere the
answers are what the standard library knows, or None.

Control groups come in two versions. In both, a process belongs to one group of a tree, and every group above it limits
it as well. Inside a container the tree usually starts at the container's own group, so that the path in
/proc/self/cgroup may not exist below the mount point: the mount point itself is then the group.
"""

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path("/")
_NO_LIMIT = 2**60  # version 1 writes "no limit" as a number just below 2**63


def usable_cores(root: Path = ROOT) -> int:
    """CPUs this process may run on at once: its affinity, cut to the CPU quota of its control groups, rounded up."""
    found = [float(len(affinity()) or os.cpu_count() or 1)]
    if (quota := cpu_quota(root)) is not None:
        found.append(quota)
    return max(1, math.ceil(min(found)))


def affinity() -> Sequence[int]:
    """The CPUs the scheduler may put this process on; empty where the system cannot tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the control groups grant; None without a limit."""
    found = []
    for group in _groups(root, ""):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            found.append(int(quota) / int(period))
    for group in _groups(root, "cpu"):
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # -1: no limit
            found.append(int(quota) / int(period))
    return min((cores for cores in found if cores > 0), default=None)


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes a new process may take: what the system, and every control group around us, has left. None: unknown."""
    found = [
        int(line.split()[1]) * 1024
        for line in _read(root / "proc/meminfo").splitlines()
        if line.startswith("MemAvailable:")
    ]
    for controller, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for group in _groups(root, controller):
            most, taken = _read(group / limit), _read(group / used)
            if most.isdigit() and taken.isdigit() and int(most) < _NO_LIMIT:
                found.append(max(0, int(most) - int(taken) + _reclaimable(group / "memory.stat")))
    return min(found) if found else None


def resident_memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process holds now, mapped files included; 0 where the system does not tell."""
    fields = _read(root / "proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def give_back_memory() -> None:
    """Return what the C library's allocator holds and nobody uses to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def load(root: Path = ROOT) -> float | None:
    """Processes that ran or waited for a CPU over the last minute, on average; None where the system cannot tell."""
    fields = _read(root / "proc/loadavg").split()
    return float(fields[0]) if fields else None


def huge_pages(root: Path = ROOT) -> str | None:
    """The kernel's rule for transparent huge pages: always, madvise or never; None where it has no such thing."""
    rule = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return rule.partition("[")[2].partition("]")[0] or None


def stolen(root: Path = ROOT) -> tuple[int, int]:
    """Clock ticks since the start that the host gave to other guests instead of our CPUs, and all ticks."""
    first = _read(root / "proc/stat").partition("\n")[0]
    ticks = [int(value) for value in first.split()[1:9]]
    return (ticks[7], sum(ticks)) if len(ticks) == 8 else (0, 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in, the innermost first; controller "" is version 2's one tree."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        if not mount.is_dir() and controller:  # "cpu,cpuacct" may be mounted under either name
            mount = root / "sys/fs/cgroup" / controller
        inner = PurePosixPath(path.removeprefix("/"))
        if ".." in inner.parts or not (mount / inner).is_dir():
            inner = PurePosixPath()
        yield from (mount / part for part in (inner, *inner.parents))


def _reclaimable(path: Path) -> int:
    """Bytes of file pages in a control group: they count as used and are given back on demand."""
    counts = dict(line.split(maxsplit=1) for line in _read(path).splitlines())
    below = "total_" if "total_inactive_file" in counts else ""  # version 1 counts the groups below apart
    return sum(int(counts.get(f"{below}{kind}_file", 0)) for kind in ("inactive", "active"))


def _read(path: Path) -> str:
    """The text of a small file, stripped; empty where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
