"""A sweep as a table, and the gap of each kind of linear layers in words."""

from typing import Any

from rich.table import Table
from rich.text import Text

from bitnet.tables import plus_minus


def sweep_table(report: dict[str, Any]) -> Table:
    """The points of a sweep: losses and gaps to the float baseline, standard errors over seeds."""
    header, rows = sweep_cells(report)
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def sweep_cells(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a sweep's table, without columns that are empty in every row."""
    titles = {
        "loss": "nats per token",
        "gap": "gap to float",
        "test_bits_per_byte": "test, bits per byte",
        "test_bits_per_byte_gap": "test, gap in bits",
        "test_gap": "test, gap in nats",
    }
    shown = [kind for kind in titles if any(point[kind] for point in report["points"])]
    best = {
        (point, linear)
        for size in report["sizes"]
        for linear, point in size["best"].items()
        if size["tried"][linear] > 1
    }
    rows = []
    for point in report["points"]:
        figures = [
            f"{value['mean']:.4f}{plus_minus(value['error'], 4)}" if (value := point[kind]) else "" for kind in shown
        ]
        chosen = (point["point"], point["linear"]) in best
        remark = f"{point['diverged']} diverged" if point["diverged"] else f"best {point['linear']}" if chosen else ""
        size = _millions(point["parameters"])
        rows.append((point["point"], point["linear"], size, str(point["seeds"]), *figures, remark))
    return ("settings", "linears", "parameters", "seeds", *(titles[kind] for kind in shown), ""), rows


def tuned_gaps(report: dict[str, Any]) -> list[str]:
    """A line for each size and kind of linear layers: the gap to the float baseline, both at their best settings."""
    return [
        _tuned_gap(report["points"], size, linear, gaps)
        for size in report["sizes"]
        for linear, gaps in size["tuned_gaps"].items()
    ]


def _tuned_gap(points: list[dict[str, Any]], size: dict[str, Any], linear: str, gaps: dict[str, Any]) -> str:
    units = {
        "gap": "nats per token on the validation text",
        "test_gap": "nats per token",
        "test_bits_per_byte_gap": "bits per byte on the test text",
    }
    texts = [
        f"{value['mean']:+.4f}{plus_minus(value['error'], 4)} {unit}"
        for kind, unit in units.items()
        if (value := gaps[kind])
    ]
    best, tried = size["best"], size["tried"]
    ours, baseline = (f"{kind} at {best[kind]} (best of {tried[kind]})" for kind in (linear, "float"))
    parameters = next(p["parameters"] for p in points if (p["point"], p["linear"]) == (best[linear], linear))
    pairs = f"{gaps['pairs']} pair{'' if gaps['pairs'] == 1 else 's'} of runs"
    return f"{_millions(parameters)} parameters, {ours} against {baseline}, {pairs}: {', '.join(texts) or 'no gap'}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}M"
