"""The report of `bitnet compare` as a table for a terminal."""

from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bitnet.tables import plus_minus

COLUMNS = (
    "method", "MB", "bits/weight", "bits/byte", "more than baseline", "KL", "top-1", "prefill t/s", "decode t/s",
    "model MB", "library", "note",
)  # fmt: skip


def comparison_tables(report: dict[str, Any]) -> list[RenderableType]:
    """The heading lines, the measured rows, and the methods without figures."""
    rows = report["results"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        words = column in ("method", "library", "note")
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    family = ""
    for row in (row for row in rows if row["status"] == "ok"):
        if family and family != row["family"]:
            table.add_section()
        family = row["family"]
        table.add_row(*(Text(cell) for cell in cells(row)))
    shown: list[RenderableType] = [Text(line) for line in head(report)]
    shown.append(table)
    rest = [row for row in rows if row["status"] != "ok"]
    if rest:
        missing = Table(title="not measured", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("method", "status", "why"):
            missing.add_column(column, overflow="fold")
        for row in rest:
            style = "bold red" if row["status"] == "failed" else "dim"
            missing.add_row(row["title"], Text(row["status"], style=style), Text(row["note"]))
        shown.append(missing)
    return shown


def head(report: dict[str, Any]) -> list[str]:
    """What was compared, and on which machine, in two lines."""
    machine, text, timing = report["machine"], report["text"], report["timing"]
    runs = timing["rounds"] * timing["repeats"]
    models = (
        f"{report['parameters'] / 1e6:.1f}M parameters, {report['models']['steps']:,} steps on "
        f"{report['models']['tokens'] / 1e6:.1f}M tokens; scored on {text['tokens']:,} tokens "
        f"({text['bytes'] / 1e6:.2f} MB) of {', '.join(text['data'])} in windows of {text['context']}; "
        f"KL (nats per token) and top-1 to the float baseline over {text['compared_positions']:,} positions"
    )
    speeds = (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['date']}; tokens/s: prefill of "
        f"{timing['prefill']}, then {timing['decode']} one by one, medians of {runs} ± half the interquartile range; "
        "model MB: peak memory, less that of the process before it loaded the model"
    )
    return [models, speeds]


def with_current_keys(report: dict[str, Any]) -> dict[str, Any]:
    """A stored report with the keys of this version: until 2026-11-28 the baseline was called twin."""
    rows = [{key.replace("_twin", "_baseline"): value for key, value in row.items()} for row in report["results"]]
    return {**report, "results": rows}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A measured row under COLUMNS."""
    more = row["more_than_baseline"]
    return (
        row["title"],
        f"{row['file_bytes'] / 1e6:.2f}",
        f"{row['bits_per_weight']:.2f}",
        f"{row['bits_per_byte']:.4f}{plus_minus(row['bits_per_byte_error'], 4)}",
        f"{more:+.4f}{plus_minus(row['more_than_baseline_error'], 4)}" if row["method"] != "fp32" else "",
        kl(row["kl"]) if row["method"] != "fp32" else "",
        f"{row['top1']:.1%}" if row["method"] != "fp32" else "",
        _speed(row, "prefill"),
        _speed(row, "decode"),
        f"{row['model_bytes'] / 1e6:.0f}",
        row["library"],
        row["note"],
    )


def _speed(row: dict[str, Any], what: str) -> str:
    low, high = row[f"{what}_spread"]
    median = row[f"{what}_tokens_per_second"]
    return f"{median:,.0f} ±{(high - low) / 2 / median:.0%}"


def kl(value: float) -> str:
    """A divergence, small ones in scientific notation."""
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"
