"""What this process may use of the machine: cores and memory, the limits of a container (control groups) included.

Linux reports both in files; `root` stands for `/`, so that tests can lay out a machine. On other systems the answers
come from the standard library, or are None.

Control groups exist in two versions. In both, a process belongs to one group of a tree, and every group above it limits
it as well. Inside a container the tree usually starts at the container's own group; the path in /proc/self/cgroup may
then not exist below the mount point, and the mount point itself is the group.
"""

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path("/")
BUSY = 0.10  # share of the CPUs used by others, below which figures vary no more than on an idle machine
_NO_LIMIT = 2**60  # version 1 writes "no limit" as a number just below 2**63


def usable_cores(root: Path = ROOT) -> int:
    """CPUs this process may run on at once: its affinity, cut to the CPU quota of its control groups, rounded up."""
    found = [float(len(affinity()) or os.cpu_count() or 1)]
    if (quota := cpu_quota(root)) is not None:
        found.append(quota)
    return max(1, math.ceil(min(found)))


def affinity() -> Sequence[int]:
    """The CPUs the scheduler may put this process on; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpu_quota(root: Path = ROOT) -> float | None:
    """The CPU quota of the control groups, in CPUs; None without a limit."""
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
    """Bytes a new process may take: the least that the system and the control groups have left; None: unknown."""
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
    """Processes that ran or waited for a CPU over the last minute, on average; None where the system does not say."""
    fields = _read(root / "proc/loadavg").split()
    return float(fields[0]) if fields else None


def busy(cpus: Sequence[int], root: Path = ROOT, wait: Callable[[], None] = lambda: time.sleep(0.5)) -> float | None:
    """How many of these CPUs other processes kept busy during `wait`; None where the system does not say.

    A short sample of the present; the load average covers a minute and all CPUs of the host.
    """
    before = _cpu_ticks(root)
    wait()
    after = _cpu_ticks(root)
    there = [cpu for cpu in cpus if cpu in before and cpu in after]
    if not there:
        return None
    spans = [[late - early for early, late in zip(before[cpu], after[cpu], strict=True)] for cpu in there]
    return sum(used / max(1, total) for used, total in spans)


def _cpu_ticks(root: Path) -> dict[int, tuple[int, int]]:
    """Clock ticks of each CPU: busy ones, and all."""
    found = {}
    for line in _read(root / "proc/stat").splitlines():
        name, *fields = line.split()
        ticks = [int(value) for value in fields[:8]]
        if name.startswith("cpu") and name != "cpu" and len(ticks) == 8:
            found[int(name[3:])] = (sum(ticks) - ticks[3] - ticks[4], sum(ticks))  # idle, and waiting for I/O
    return found


def physical_cores(root: Path = ROOT) -> int | None:
    """Physical cores of the machine, hyperthreads not counted; None where the system does not say."""
    folder = root / "sys/devices/system/cpu"
    cores = {_read(path) for path in folder.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(cores - {""}) or None


def huge_pages(root: Path = ROOT) -> str | None:
    """The kernel's setting for transparent huge pages: always, madvise or never; None where it has none."""
    rule = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return rule.partition("[")[2].partition("]")[0] or None


def stolen(root: Path = ROOT) -> tuple[int, int]:
    """Clock ticks since boot that the host gave to other guests, and all ticks."""
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
    """Bytes of file pages in a control group: they count as used but are freed on demand."""
    counts = dict(line.split(maxsplit=1) for line in _read(path).splitlines())
    below = (
        "total_" if "total_inactive_file" in counts else ""
    )  # version 1 has separate counts that include the groups below
    return sum(int(counts.get(f"{below}{kind}_file", 0)) for kind in ("inactive", "active"))


def _read(path: Path) -> str:
    """The text of a small file, stripped; empty if it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
