"""Parts of reports for a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def facts(rows: dict[str, str], title: str = "") -> Table:
    """A table of two columns: names in bold, and values. title: above it, if any."""
    table = Table(title=title or None, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def machine_rows(machine: dict[str, Any]) -> dict[str, str]:
    """Names and values for `facts`: the cores, memory, huge pages, load and torch kernels of `bitnet doctor`.

    machine: the "machine" part of its report.
    """
    cores, huge = machine["physical_cores"], machine["huge_pages"]
    parts = [
        f"{machine['cpus']} CPUs",
        "" if cores is None else f"{cores} physical cores",
        "" if machine["affinity"] is None else f"affinity to {machine['affinity']}",
        "no container limit" if machine["quota"] is None else f"a container's limit of {machine['quota']:.3g}",
        f"{machine['usable']} usable",
    ]
    free, busy, load = machine["memory_available"], machine["busy_cpus"], machine["load_average"]
    given = "" if huge["given"] is None else f", {huge['given'] >> 20} of {huge['asked'] >> 20} MiB given"
    average = "" if load is None else f", load average {load:.1f}"
    return {
        "cores": ", ".join(part for part in parts if part),
        "memory": "unknown" if free is None else f"{free / 1e9:.1f} GB available",
        "huge pages": f"{huge['rule'] or 'unknown'}{given}",
        "others": "unknown" if busy is None else f"{busy:.1f} CPUs busy{average}",
        "torch kernels": ", ".join(
            f"{one['type']} {one['way']} {one['gigamacs_per_second']:.3g} GMAC/s"
            for one in machine["products"]
            if one.get("gigamacs_per_second")
        )
        or "none that run",
    }


def plus_minus(error: float | None, digits: int) -> str:
    """A standard error, to follow its value; "" where there is none."""
    return "" if error is None else f" ± {error:.{digits}f}"


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal. Gives a function of (bytes done, bytes in all)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
