"""The machine a figure was measured on: what it is, and how fast it reads memory during the run."""

import platform
from datetime import date
from typing import Any

import torch

from bitnet.doctor import examine
from bitnet.kernels import native

MEMORY = (
    512 * 2**20
)  # bytes of a working set that counts as memory: larger than the caches of the machines measured so far


def describe(bandwidth: bool = True) -> dict[str, Any]:
    """Names, versions and, if asked for, the present read bandwidth, as JSON values."""
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
    """GB/s of reading MEMORY bytes with torch's current threads; the median of `repeats` passes."""
    return native.read_bandwidth(MEMORY, repeats) / 1e9
