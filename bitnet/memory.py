"""Memory is checked before work begins: what a job will hold at its peak against what the machine has left.

The kernel ends a job that does not fit without a message, often together with other programs. So each verb that can
become large adds up what it will need (`Need`) and calls `check`, which refuses with the numbers and the ways out, or
lets `--force` run it anyway. Estimates are of resident memory, mapped file pages that are read included: what
`/usr/bin/time -v` calls the maximum resident set size. benchmarks/memory.py compares them with real runs.

The needs of training are in train/memory.py, of engines in bitnet/engine/memory.py, of conversion in
bitnet/files/memory.py, of comparisons in benchmarks/compare/memory.py.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bitnet import machine
from bitnet.errors import BitNetError

_log = logging.getLogger("bitnet")

INTERPRETER = 0.30e9  # bytes of Python with torch and this package imported: 286 MB with torch 2.13, measured
_SHOWN = 0.03  # parts of a need below this share are left out of messages


@dataclass(frozen=True)
class Need:
    """Bytes a job holds, by what they are for, in each of its phases; the largest phase counts."""

    phases: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, **terms: float) -> "Need":
        """A need of one phase. Underscores in names become spaces."""
        return cls({"": {name.replace("_", " "): size for name, size in terms.items()}})

    @property
    def terms(self) -> Mapping[str, float]:
        """The parts of the largest phase."""
        return max(self.phases.values(), key=lambda terms: sum(terms.values()))

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.terms.values())

    def __str__(self) -> str:
        parts = sorted(self.terms.items(), key=lambda term: -term[1])
        return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size > _SHOWN * self.total)


@dataclass(frozen=True)
class Way:
    """A change that makes a job smaller, as a user writes it, and the bytes it would then need."""

    change: str
    total: float


def gigabytes(count: float) -> str:
    """Bytes as a person says them, in GB."""
    return f"{count / 1e9:.1f} GB"


def available(device: torch.device) -> float | None:
    """Bytes that are left on a device; on a CPU, in the machine and its control groups. None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free)
    return machine.available_memory()


def budget(device: torch.device, processes: int = 1) -> float | None:
    """Bytes that `processes` like this one may hold in all: what is left, and the libraries that they hold already."""
    left = available(device)
    if left is None or device.type == "cuda":
        return left
    return left + processes * min(machine.resident_memory(), INTERPRETER)


def check(
    what: str,
    need: Need,
    device: torch.device,
    *,
    ways: Sequence[Way] = (),
    instead: str = "",
    processes: int = 1,
    force: bool | None = False,
) -> None:
    """Raise BitNetError where `processes` processes that each need this do not fit. Under `force`, one warning.

    what: the job, for the message. ways: changes that help, of which the useful ones are named; instead: other ways
    out, in words; force: None for a verb without that option. On a GPU each process has its own device.
    """
    count = 1 if device.type == "cuda" else processes
    have = budget(device, count)
    if have is None or count * need.total <= have:
        return
    several = f" in {count} processes" if count > 1 else ""
    where = " on the GPU" if device.type == "cuda" else ""
    text = (
        f"{what} needs about {gigabytes(count * need.total)} of memory{where}{several} ({need}), expected at most the "
        f"{gigabytes(have)} available"
    )
    if force:
        _log.warning("%s; running it anyway (--force)", text)
        return
    out = [f"{way.change} ({gigabytes(count * way.total)})" for way in useful(ways, need.total, have / count)]
    out += [instead] if instead else []
    out += ["--force runs it anyway"] if force is not None else []
    raise BitNetError(f"{text}; {', '.join(out)}")


def useful(ways: Sequence[Way], total: float, have: float) -> list[Way]:
    """The ways that fit; where none does, those that help by a tenth or more, the best first; four at most."""
    fits = [way for way in ways if way.total <= have]
    helps = sorted((way for way in ways if way.total < 0.9 * total), key=lambda way: way.total)
    return (fits or helps)[:4]


def mildest(option: str, have: float, values: Sequence[int], total: Callable[[int], float]) -> list[Way]:
    """The first of falling values with which a job fits, or the last one."""
    if not values:
        return []
    value = next((n for n in values if total(n) <= have), values[-1])
    return [Way(f"{option} {value}", total(value))]


def halves(count: int) -> list[int]:
    """Half of a count, a quarter ... down to 1."""
    return [count >> shift for shift in range(1, count.bit_length())]
