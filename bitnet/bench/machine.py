"""The machine a figure was measured on: what it is, and how fast it reads memory in this very run."""

import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bitnet.doctor import examine
from bitnet.kernels import native

MEMORY = 512 * 2**20  # bytes of a working set: more than the part of a cache that one machine at hand may fill


def describe(bandwidth: bool = True) -> dict[str, Any]:
    """Names and versions, and the read bandwidth of the moment, as JSON values."""
    report = examine()
    described = {
        "date": date.today().isoformat(),
        "cpu": report["cpu"]["name"],
        "cores": report["cpu"]["cores"],
        "threads": torch.get_num_threads(),
        "features": report["cpu"]["features"],
        "devices": report["devices"],
        "backend": report["selected"].get("cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
        "bitnet": report["bitnet"],
    }
    if bandwidth:
        described["read_gigabytes_per_second"] = round(read_bandwidth(), 1)
    return described


def read_bandwidth(repeats: int = 7) -> float:
    """GB/s of reading 512 MiB with torch's current threads; the median of `repeats` passes."""
    return native.read_bandwidth(MEMORY, repeats) / 1e9


def available_memory() -> int | None:
    """Bytes a new process may take: what the system, or the control group around us, has left. None: it cannot tell."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        found.append(int(most) - int(used.read_text(encoding="ascii")) + _reclaimable(group / "memory.stat"))
    return min(found) if found else None


def _reclaimable(path: Path) -> int:
    """Bytes of file pages in a control group: they count as used and are given back on demand."""
    if not path.exists():
        return 0
    counts = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
    return int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))


def stolen() -> tuple[int, int]:
    """Clock ticks that the CPUs did not get from the machine they are a part of, and all ticks, since it started."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0, 0
    ticks = [int(value) for value in path.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    return ticks[7], sum(ticks)
