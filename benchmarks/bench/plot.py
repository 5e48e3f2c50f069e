"""Two pictures of a result: the roofline, and the contenders side by side (needs matplotlib: the extra `plot`)."""

import math
from pathlib import Path
from typing import Any

from bitnet.benchmarks.bench.table import measured
from bitnet.plotting import check_target, pyplot, save

# Distinguished in grey print, too: by hatch in bars, by shape in points.
_COLOURS = ("#1f5aa6", "#e07b39", "#5b8c5a", "#8c8c8c", "#b04a5a", "#6a5acd", "#c9a227", "#3a9ca6")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
_APART = 1.4  # factor between two peaks whose names do not overlap
Row = dict[str, Any]


def draw(document: dict[str, Any], path: Path) -> list[Path]:
    """Write both pictures of a bench document beside `path`. Returns their paths."""
    check_target(path)
    rows = measured(document["results"])
    document = document | {"results": rows}
    if len({row.get("device", "cpu") for row in rows}) > 1:
        document = document | {"results": [row | {"backend": f"{row['backend']} on {row['device']}"} for row in rows]}
    paths = [path.with_stem(f"{path.stem}-{kind}") for kind in ("roofline", "comparison")]
    for target, make in zip(paths, (roofline, comparison), strict=True):
        save(make(document), target)
    return paths


def roofline(document: dict[str, Any]) -> Any:
    """Multiply-adds per second over multiply-adds per byte, below the bandwidths and peaks of the same run.

    A panel for each number of threads.
    """
    plt = pyplot()
    rows: list[Row] = document["results"]
    threads = sorted({row["threads"] for row in rows})
    figure, axes = plt.subplots(
        1, len(threads), figsize=(6.2 * len(threads) + 1.6, 5), layout="constrained", squeeze=False, sharey=True
    )
    for axis, count in zip(axes[0], threads, strict=True):
        _roofline_panel(axis, [row for row in rows if row["threads"] == count], names(rows, "backend"))
        axis.set_title(f"{count} thread{'s' * (count > 1)}", loc="left", fontsize=11)
    axes[0][0].set_ylabel("multiply-adds per second (billions)")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize=9)
    return figure


def _roofline_panel(axis: Any, rows: list[Row], backends: list[str]) -> None:
    points = [(row["macs_per_token"] / row["bytes_per_token"], row) for row in rows]
    low, high = min(x for x, _ in points) / 3, max(x for x, _ in points) * 4
    bottom = min(x_row["macs_per_token"] * x_row["median_ts"] / 1e9 for _, x_row in points) / 3
    kinds = {row["bandwidth_gigabytes_per_second"]: "cache" if row["cached"] else "memory" for row in rows}
    reads = sorted(kinds)
    peaks = {
        row[f"{whose}peak_of"]: row[f"{whose}peak_gigamacs_per_second"]
        for row in rows
        for whose in ("own_", "")
        if row.get(f"{whose}peak_gigamacs_per_second")
    }
    top = max(peaks.values(), default=max(reads) * high)
    # Lines for the slowest and the fastest working set: memory, and the cache that holds the smallest model.
    ends = dict.fromkeys((reads[0], reads[-1]) if reads[-1] > 1.25 * reads[0] else (reads[-1],))
    for rate in ends:
        axis.plot([low, top / rate], [low * rate, top], color="black", linewidth=1)
        axis.annotate(
            f"{kinds[rate]} {rate:.0f} GB/s",
            (low * 1.15, low * rate * 1.15),
            rotation=38,
            fontsize=8,
            rotation_mode="anchor",
        )
    _peak_lines(axis, peaks, low, high)
    for name in backends:
        place = backends.index(name) % len(_SHAPES)
        mine = [(x, row) for x, row in points if row["backend"] == name]
        axis.plot(
            [x for x, _ in mine],
            [row["macs_per_token"] * row["median_ts"] / 1e9 for _, row in mine],
            _SHAPES[place],
            color=_COLOURS[place],
            markeredgecolor="black",
            markeredgewidth=0.5,
            markersize=7,
            label=name,
        )
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(bottom, low * reads[0]), top * 2))
    axis.set_xlabel("multiply-adds per byte read")
    axis.grid(which="major")


def _peak_lines(axis: Any, peaks: dict[str, float], low: float, high: float) -> None:
    """A line for each peak, in billions of multiply-adds per second. low, high: ends of the other axis."""
    lower, at_left = 0.0, True
    for name, peak in sorted(peaks.items(), key=lambda item: item[1]):
        at_left = not at_left if peak < lower * _APART else True  # the names of two close peaks go to opposite ends
        lower = peak
        x, side = (low * 1.1, "left") if at_left else (high / 1.1, "right")
        axis.axhline(peak, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
        axis.annotate(f"{name}: {peak:,.0f}", (x, peak * 1.05), fontsize=8, ha=side)


def comparison(document: dict[str, Any]) -> Any:
    """Tokens per second of every contender: a panel for each kind of test, a group of bars for each test."""
    plt = pyplot()
    rows: list[Row] = document["results"]
    kinds = [kind for kind in ("prompt", "answer", "both") if any(_kind(row) == kind for row in rows)]
    groups = {kind: _groups([row for row in rows if _kind(row) == kind]) for kind in kinds}
    backends = names(rows, "backend")
    most = max(len(found) for found in groups.values())
    height = 1.3 + most * (0.16 * len(backends) + 0.22)
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.6 * len(kinds) + 1, height), layout="constrained", squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        _bars(axis, groups[kind], backends)
        title = {"prompt": "reading a prompt", "answer": "writing", "both": "reading and writing"}[kind]
        axis.set_title(title, loc="left", fontsize=11)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(backends)))
    return figure


def _kind(row: Row) -> str:
    return "both" if row["n_prompt"] and row["n_gen"] else "prompt" if row["n_prompt"] else "answer"


def _groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows that are compared with each other, by their common label."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        key = f"{row['model']}\n{row['test']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        found.setdefault(key, []).append(row)
    return found


def _bars(axis: Any, groups: dict[str, list[Row]], backends: list[str]) -> None:
    width = 0.8 / len(backends)
    shown: set[str] = set()
    for i, rows in enumerate(groups.values()):
        for j, row in enumerate(rows):
            place = backends.index(row["backend"]) % len(_COLOURS)
            y = i - 0.4 + width * (j + 0.5 + (len(backends) - len(rows)) / 2)
            axis.barh(
                y,
                row["median_ts"],
                width * 0.92,
                xerr=row["stddev_ts"],
                color=_COLOURS[place],
                hatch=_HATCHES[place],
                edgecolor="white",
                linewidth=0.3,
                error_kw={"elinewidth": 0.8},
                label=None if row["backend"] in shown else row["backend"],
            )
            shown.add(row["backend"])
            value = row["median_ts"]
            text = f" {value:,.0f}" if value >= 100 else f" {value:.1f}"
            axis.annotate(text, (value + row["stddev_ts"], y), va="center", fontsize=7)
    axis.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low / 2, high * 2)  # so that the shortest bar is visible and the longest has space for its figure
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    decades = range(math.floor(math.log10(low / 2)), math.ceil(math.log10(high * 2)))
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low / 2 <= tick <= high * 2]
    axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("tokens per second (logarithmic)")
    axis.grid(axis="x")
    axis.set_axisbelow(True)


def names(rows: list[Row], key: str) -> list[str]:
    """The values of a key, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))
