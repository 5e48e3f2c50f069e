"""Results as Markdown, in the form of llama-bench, and as CSV."""

import csv
import io
import json
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], words: Container[int] = ()) -> str:
    """A Markdown table whose columns are also aligned as text. words: columns that are not numbers."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(w) if i in words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        return "| " + " | ".join(padded) + " |"

    ruler = ("-" * w if i in words else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(cells[0]), "| " + " | ".join(ruler) + " |", *map(line, cells[1:])])


def stored(text: str) -> Any:
    """The JSON document in the output of a run or in a stored file: the complete text, or else its last line.

    Raises json.JSONDecodeError for anything else.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads((text.strip().splitlines() or [""])[-1])


def size(count: float) -> str:
    """Bytes with three digits."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{digits(count / unit)} {name}"
    return f"{count:.0f} B"


def digits(value: float) -> str:
    """At least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _bound(row: Row) -> str:
    """What bounds a row, and how fast that is."""
    if is_left_out(row):
        return ""
    if row["limit_by"] is None:
        return "unknown"
    if row["limit_by"] in ("memory", "cache"):
        return f"{row['limit_by']} {digits(row['bandwidth_gigabytes_per_second'])} GB/s"
    return f"{row['limit_by']} {digits(row['peak_gigamacs_per_second'])} GMAC/s"


def is_left_out(row: Row) -> bool:
    """Whether a row has a reason instead of figures."""
    return row.get("left_out") is not None


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows with figures."""
    return [row for row in rows if not is_left_out(row)]


def _speed(row: Row) -> str:
    return "left out" if is_left_out(row) else f"{digits(row['median_ts'])} ± {digits(row['stddev_ts'])}"


def _optional(key: str, show: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else show(row[key])


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda row: row["model"]),
    ("backend", lambda row: row["backend"]),
    ("test", lambda row: row["test"]),
    ("size", _optional("model_size", size)),
    ("params", lambda row: f"{digits(row['n_params'] / 1e6)} M"),
    ("device", lambda row: "" if row.get("device", "cpu") == "cpu" else row["device"]),
    ("threads", lambda row: str(row["threads"])),
    ("t/s", _speed),
    ("first token ms", _optional("first_token_ms", digits)),
    ("read per token", _optional("bytes_per_token", size)),
    ("GB/s", _optional("read_gigabytes_per_second", digits)),
    ("bound by", _bound),
    ("% of it", _optional("percent_of_limit", lambda value: f"{value:.0f}")),
    ("memory", _optional("model_memory_bytes", size)),
    ("load s", _optional("load_seconds", digits)),
    ("J/token", _optional("joules_per_token", lambda value: f"{value:.3g}")),
    ("$/M tokens", _optional("dollars_per_million", lambda value: f"{value:.3g}")),
    ("remark", lambda row: row.get("left_out") or row.get("remark") or ""),
)
_WORDS = 3  # columns at the left that are not numbers


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the results, without columns that are empty in every row."""
    shown = [[show(row) for _, show in COLUMNS] for row in rows]
    kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in shown)]
    return [COLUMNS[i][0] for i in kept], [[row[i] for i in kept] for row in shown]


def results_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    return markdown(*cells(rows), range(_WORDS))


_LEGEND = (
    "t/s: median ± standard deviation of {} rounds (-r); memory: peak resident bytes, loading included, above those "
    "of the interpreter and its libraries; load s: until it can start, which for a mapped file is before it is read; "
    "bound by: bytes over bandwidth or multiply-adds over peak, whichever takes longer; int8 is held against the "
    "fastest int8 product of any contender in the run"
)


def machine_line(machine: dict[str, Any]) -> str:
    """The machine that figures were measured on, in one line; unknown facts are left out."""
    texts = (
        {"cpu": "{}", "cores": "{} cores", "read_gigabytes_per_second": "memory read at {} GB/s"},
        {"bitnet": "bitnet {}", "torch": "torch {}", "python": "Python {}", "date": "{}"},
    )
    known = (", ".join(text.format(machine[key]) for key, text in half.items() if key in machine) for half in texts)
    return "; ".join(half for half in known if half)


def load_line(load: dict[str, Any]) -> str:
    """The load of other processes before the run, in one line."""
    average = "" if load["average"] is None else f"; load average {load['average']:.1f}"
    verdict = "a busy machine: figures are too low, and vary; " if load["busy"] else ""
    return (
        f"{verdict}before the run other processes kept {load['others']:.1f} of {load['cpus']} "
        f"CPU{'s' * (load['cpus'] > 1)} busy{average}"
    )


def notes(document: dict[str, Any]) -> list[str]:
    """The notes below the table, a line each."""
    machine = document["machine"]
    found = [
        machine_line(machine),
        _LEGEND.format(document["repetitions"]),
        *(
            f"{name}: {what}"
            for name, what in {row["backend"]: row["what"] for row in document["results"]}.items()
            if what
        ),
    ]
    where = {"memory": "in memory", "smaller": "in smaller sets, which fit the caches in part or entirely"}
    spread = [
        f"{off:.1%} ({worst:.0%}) {where[of]}" for of, (off, worst) in sorted(document["bandwidth_off_median"].items())
    ]
    verdict = "" if document["steady"] else f": unsteady, memory more than {document['steady_within']:.0%}"
    found.append(
        "read bandwidth: three in four samples (the worst) deviate from their median by at most "
        f"{', '.join(spread)}{verdict}"
    )
    if document["stolen"] >= 0.01:
        found.append(f"{document['stolen']:.0%} of the CPUs' time went to other guests of the host")
    if (load := document.get("load")) and load["others"] is not None:
        found.append(load_line(load))
    return found + document["notes"]


def as_markdown(document: dict[str, Any]) -> str:
    """The table and its notes."""
    return "\n".join([results_table(document["results"]), "", *(f"- {note}" for note in notes(document))])


def as_csv(rows: list[Row]) -> str:
    """All figures of all rows, without the single samples."""
    keys = [key for key in rows[0] if key != "samples_ts"]
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
