"""Two pictures of a comparison: quality against size, and speed against size (needs matplotlib: the extra `plot`)."""

import math
from pathlib import Path
from typing import Any

from bitnet.errors import BitNetError
from bitnet.plotting import pyplot, save_both

# A colour and a marker per family. Colours are Okabe and Ito's, which most colour-blind people can distinguish.
_STYLES = {
    "float": ("#555555", "o", "float"),
    "int8": ("#0072B2", "s", "INT8, weights only"),
    "ptq": ("#56B4E9", "D", "PTQ, activations too"),
    "qat": ("#CC79A7", "P", "QAT"),
    "gptq": ("#E69F00", "X", "GPTQ"),
    "gguf": ("#009E73", "^", "GGUF, llama.cpp"),
    "bitnet": ("#D55E00", "*", "BitNet"),
}
_Box = tuple[float, float, float, float]


def plot_comparison(report: dict[str, Any], target: Path) -> list[Path]:
    """Write `comparison` as target.png and target.svg. Raises BitNetError without matplotlib or a measured row."""
    return save_both(comparison(report), target)


def comparison(report: dict[str, Any]) -> Any:
    """Quality against size and speed against size, of the measured rows of a report."""
    plt = pyplot()
    from matplotlib.lines import Line2D

    rows = [row for row in report["results"] if row["status"] == "ok"]
    if not rows:
        raise BitNetError("plot: got no measured row, expected at least one; see the reasons in the table")
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 7), layout="constrained")
    _panel(left, rows, "bits_per_byte", "bits per byte of held-out text (lower is better)", "quality against size")
    speed = f"decoded tokens/s, {report['machine']['threads']} threads (higher is better)"
    _panel(right, rows, "decode_tokens_per_second", speed, "speed against size")
    right.set_yscale("log")
    machine = report["machine"]
    size, tokens = report["parameters"] / 1e6, report["models"]["tokens"] / 1e6
    title = f"{size:.1f}M parameters trained on {tokens:.1f}M tokens; {machine['cpu']}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    figure.canvas.draw()
    for axis, key in ((left, "bits_per_byte"), (right, "decode_tokens_per_second")):
        _label(figure, axis, [(row["file_bytes"] / 1e6, row[key], row["method"]) for row in rows])
    families = list(dict.fromkeys(row["family"] for row in rows))
    handles = [
        Line2D([], [], linestyle="", color=_STYLES[f][0], marker=_STYLES[f][1], markersize=8, label=_STYLES[f][2])
        for f in families
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _panel(axis: Any, rows: list[dict[str, Any]], key: str, label: str, title: str) -> None:
    for row in rows:
        colour, marker, _ = _STYLES[row["family"]]
        size = row["file_bytes"] / 1e6
        if key == "bits_per_byte" and row["more_than_baseline_error"] is not None:
            # The error of the difference to the baseline: all models read the same text.
            axis.errorbar(size, row[key], row["more_than_baseline_error"], color=colour, capsize=2, linewidth=1)
        area = 220 if marker == "*" else 70
        axis.scatter(size, row[key], s=area, color=colour, marker=marker, edgecolor="white", linewidth=0.6, zorder=3)
    front = pareto([(row["file_bytes"] / 1e6, row[key]) for row in rows], lower=key == "bits_per_byte")
    axis.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=1, linestyle="--", zorder=1)
    axis.set_xscale("log")
    axis.set_xlabel("file, MB (including the tokenizer)")
    axis.set_ylabel(label)
    axis.set_title(title, loc="left", fontsize=11)
    sizes = [row["file_bytes"] / 1e6 for row in rows]
    axis.set_xlim(min(sizes) / 1.25, max(sizes) * 1.45)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    axis.grid(which="both")


def pareto(points: list[tuple[float, float]], *, lower: bool) -> list[tuple[float, float]]:
    """The points (size, quality) that no smaller point beats, by size. lower: whether less is better."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front


def _label(figure: Any, axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Write each name at the nearest place to its point that is free of other names and points."""
    scale = figure.dpi / 72
    dots = [tuple(axis.transData.transform((x, y))) for x, y, _ in points]
    taken: list[_Box] = [(px - 6 * scale, py - 6 * scale, px + 6 * scale, py + 6 * scale) for px, py in dots]
    frame = axis.get_window_extent()
    for (x, y, name), (px, py) in sorted(zip(points, dots, strict=True), key=lambda pair: pair[1]):
        width, height = 4.6 * len(name) * scale, 9.5 * scale  # about that of letters of 8 points
        for dx, dy in _places():
            left, bottom = px + dx * scale - (width if dx < 0 else 0), py + dy * scale - height / 2
            box = (left, bottom, left + width, bottom + height)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        far = math.hypot(dx, dy) > 14
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if far else None
        axis.annotate(
            name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8, va="center",
            ha="right" if dx < 0 else "left", arrowprops=line,
        )  # fmt: skip


def _places() -> list[tuple[float, float]]:
    """Offsets in points, the nearest first; right of the point before left of it."""
    grid = [(side * dx, dy) for dx in (9, 22, 40, 65, 95) for side in (1, -1) for dy in range(-200, 201, 10)]
    return sorted(grid, key=lambda place: math.hypot(*place) + (1 if place[0] < 0 else 0))


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
