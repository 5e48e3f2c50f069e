"""Whether a new result of `bitnet bench -o json` is slower than an old one: python benchmarks/regress.py OLD NEW

It measures nothing: the same two files give the same answer on any machine.

Absolute times differ between machines and between days, so each row is compared by a ratio that both runs have:

    reference    t/s over the t/s of the first contender that is not ours (--reference picks another), same test and run
    machine      without a reference in both runs: t/s over what the machine did in that run, the read bandwidth or the
                 peak of products, whichever bounds the row. Our own bytes and multiply-adds do not enter: an engine
                 that reads more than before is slower
    absolute     with neither: t/s, where both runs come from the same CPU

A row is slower when the new ratio over the old one is below 1 - max(FLOOR, 3 sigma). sigma is the standard error of
that quotient: that of each median, 1.25 s / sqrt(n) with the spread s of its own run, and that of the machine's rate
where it is used. FLOOR is how much runs of one build differ beyond their own spread: caches, pages, and neighbours that
stay for a complete run.

A row is called noisy where its bound is below 1 - TOO_NOISY, and where it has fewer than LEAST samples, whose spread is
unknown.

Exit code: 0; 1 if a row is slower or is missing from the new run; 2 for files that cannot be compared, or where all
rows are noisy.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.benchmarks.bench.table import digits, markdown, measured, stored
from bitnet.errors import BitNetError

FLOOR = 0.05
TOO_NOISY = 0.30
LEAST = 3  # samples of a row for its spread to be known
_SIGMAS = 3.0
_MEDIAN = 1.25  # a median's standard error over a mean's, for normal noise
Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Verdict:
    """One row in both runs. `change` is new over old, `bound` the least that passes."""

    key: Key
    by: str
    old: float
    new: float
    change: float
    bound: float

    @property
    def slower(self) -> bool:
        """Whether the change is more than noise."""
        return self.change < self.bound

    @property
    def noisy(self) -> bool:
        """Whether the bound is too low to detect anything but a large change."""
        return self.bound < 1 - TOO_NOISY


def read(path: Path) -> dict[str, Any]:
    """A bench document. Raises BitNetError for anything else."""
    try:
        document = stored(path.read_text(encoding="utf-8"))
        rows = document["results"] = measured(document["results"])  # rows that were left out have no figures to compare
        if document["benchmark"] != "bench" or not rows:
            raise BitNetError(
                f"{path}: got a result of '{document['benchmark']}', expected one of bitnet bench -o json"
            )
    except (OSError, IndexError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise BitNetError(
            f"{path}: got no result of bitnet bench -o json ({error}), expected one; run it again"
        ) from None
    return document


def key(row: Row) -> Key:
    """Identifies the same measurement in another run."""
    device = row.get("device", "cpu")
    backend = row["backend"] if device == "cpu" else f"{row['backend']} on {device}"
    return row["model"], backend, row["threads"], row["test"]


def noise(row: Row) -> float:
    """Standard error of a row's median, relative to the median; infinite for too few samples."""
    count = len(row["samples_ts"])
    return _MEDIAN * row["stddev_ts"] / row["median_ts"] / math.sqrt(count) if count >= LEAST else math.inf


def allowed(document: dict[str, Any], row: Row) -> tuple[str, float, float] | None:
    """What bounds a row, the rate at which the machine did that in its run, and that rate's relative standard error."""
    by = row["limit_by"]
    if by is None:
        return None
    reads = by in ("memory", "cache")
    rate = row["bandwidth_gigabytes_per_second" if reads else "peak_gigamacs_per_second"]
    samples: list[float] = []
    for seen in document.get("measured", []):
        here = [seen[name] == row[name] for name in ("model", "threads")]
        if all(here) and seen.get("device", "cpu") == row.get("device", "cpu"):
            sizes = {read["bytes"]: read["samples"] for read in seen["reads"]}
            samples = sizes[row["working_set_bytes"]] if reads else seen.get("gigamacs_samples", {}).get(by, [])
    spread = statistics.stdev(samples) / statistics.median(samples) if len(samples) > 1 else 0.0
    # A bandwidth is a median of its samples, a peak the best of a few.
    return (
        "bandwidth" if reads else by,
        rate,
        _MEDIAN * spread / math.sqrt(len(samples)) if reads and samples else spread,
    )


def reference_of(document: dict[str, Any], row: Row, name: str | None) -> Row | None:
    """The row of another contender in the same test of the same run; by default the first that is not ours."""
    for other in document["results"]:
        same = key(other | {"backend": ""}) == key(row | {"backend": ""})  # of one device
        if same and other["backend"] != row["backend"] and (other["backend"] == name if name else not other["ours"]):
            return other
    return None


def compare(old: dict[str, Any], new: dict[str, Any], floor: float, reference: str | None = None) -> list[Verdict]:
    """Compare our rows that are in both runs. Raises BitNetError where there is none, or no common ratio."""
    before = {key(row): row for row in old["results"]}
    found = [
        _verdict(old, new, before[key(row)], row, floor, reference)
        for row in new["results"]
        if row["ours"] and key(row) in before
    ]
    if not found:
        raise BitNetError(
            "regress: the two runs share no row (model, backend, threads, test), expected at least one; repeat the "
            f"stored command: {' '.join(old['command'])}"
        )
    return found


def _verdict(
    old: dict[str, Any], new: dict[str, Any], before: Row, after: Row, floor: float, name: str | None
) -> Verdict:
    other = reference_of(old, before, name)
    again = next((row for row in new["results"] if other and key(row) == key(other)), None)
    rows = [before, after]
    machines: list[float] = []  # relative errors of the machine's rates
    if other and again:
        by, values = (
            other["backend"],
            (before["median_ts"] / other["median_ts"], after["median_ts"] / again["median_ts"]),
        )
        rows += [other, again]
    elif (was := allowed(old, before)) and (now := allowed(new, after)) and was[0] == now[0]:
        by, values = f"t/s per {was[0]}", (before["median_ts"] / was[1], after["median_ts"] / now[1])
        machines = [was[2], now[2]]
    elif old["machine"]["cpu"] == new["machine"]["cpu"]:
        by, values = "t/s", (before["median_ts"], after["median_ts"])
    else:
        raise BitNetError(
            f"regress: {' '.join(map(str, key(after)))}: got two machines and no common ratio, expected a "
            "reference contender in both runs (--against torch-bf16) or a known limit"
        )
    sigma = math.sqrt(sum(error**2 for error in [*map(noise, rows), *machines]))
    return Verdict(key(after), by, *values, values[1] / values[0], 1 - max(floor, _SIGMAS * sigma))


def missing(old: dict[str, Any], new: dict[str, Any]) -> list[Key]:
    """Our rows that the new run no longer has."""
    there = {key(row) for row in new["results"]}
    return [key(row) for row in old["results"] if row["ours"] and key(row) not in there]


def table(verdicts: list[Verdict]) -> str:
    """The comparison as a Markdown table, the worst first."""
    header = ("model", "backend", "threads", "test", "compared by", "old", "new", "change", "bound", "verdict")
    rows = [
        (
            *map(str, one.key),
            one.by,
            digits(one.old),
            digits(one.new),
            f"{one.change - 1:+.1%}",
            f"{one.bound - 1:+.1%}",
            "SLOWER" if one.slower else "noisy" if one.noisy else "ok",
        )
        for one in sorted(verdicts, key=lambda one: one.change - one.bound)
    ]
    return markdown(header, rows, range(2))


def main() -> int:
    """Compare, print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--floor", type=float, default=FLOOR, help=f"least change that counts; default {FLOOR}")
    parser.add_argument("--reference", metavar="BACKEND", help="contender to compare with; default: the first not ours")
    options = parser.parse_args()
    try:
        old, new = read(options.old), read(options.new)
        verdicts, gone = compare(old, new, options.floor, options.reference), missing(old, new)
    except BitNetError as error:
        print(f"regress: error: {error}", file=sys.stderr)
        return 2
    print(table(verdicts))
    for one in gone:
        print(f"regress: error: got no row {' '.join(map(str, one))} in the new run, expected it", file=sys.stderr)
    if gone or any(one.slower for one in verdicts):
        return 1
    if all(one.noisy for one in verdicts):
        print(
            "regress: error: got runs too noisy to compare; repeat them on a quiet machine or with -r 10",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
