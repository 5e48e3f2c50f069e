"""The machine a figure was measured on: what it is, and how fast it reads memory in this very run."""

import platform
from datetime import date
from typing import Any

import torch

from bitnet.doctor import examine
from bitnet.kernels import native

_BYTES = 512 * 2**20  # far more than any cache of the machines at hand


def describe() -> dict[str, Any]:
    """Names, versions and the measured read bandwidth, as JSON values."""
    report = examine()
    return {
        "date": date.today().isoformat(),
        "cpu": report["cpu"]["name"],
        "cores": report["cpu"]["cores"],
        "threads": torch.get_num_threads(),
        "features": report["cpu"]["features"],
        "backend": report["selected"]["cpu"],
        "read_gigabytes_per_second": round(read_bandwidth(), 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_bandwidth(repeats: int = 7) -> float:
    """GB/s of reading 512 MiB with torch's current threads; the median of `repeats` passes."""
    return native.read_bandwidth(_BYTES, repeats) / 1e9


def line(machine: dict[str, Any]) -> str:
    """The machine in one line for the head of a table."""
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, reads "
        f"{machine['read_gigabytes_per_second']} GB/s; torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['date']}"
    )
