"""Pictures of a sweep: every point with its gap, the training curve of every run, and loss against size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitnet.config import LINEARS
from bitnet.errors import BitNetError
from bitnet.plotting import pyplot, save_both

_COLORS = dict(zip(LINEARS, ("C0", "C2", "C1"), strict=True))  # of a kind of linear layers, in every picture


def plot_sweep(report: dict[str, Any], target: Path) -> list[Path]:
    """Write `points` as target.png and target.svg. Raises BitNetError without matplotlib."""
    return save_both(points(report), target)


def plot_curves(report: dict[str, Any], target: Path) -> list[Path]:
    """Write `curves` as target.png and target.svg. Raises BitNetError without matplotlib."""
    return save_both(curves(report), target)


def plot_scaling(report: dict[str, Any], target: Path) -> list[Path]:
    """Write `scaling` as target.png and target.svg. Raises BitNetError without matplotlib, and for a single size."""
    return save_both(scaling(report), target)


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Every figure that a report has the data for, by name."""
    able: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
        "points": (points, True),
        "curves": (curves, "curves" in report),
        "scaling": (scaling, len(report["sizes"]) > 1),
    }
    return {name: draw(report) for name, (draw, possible) in able.items() if possible}


def points(report: dict[str, Any]) -> Any:
    """The loss of every point and, where there is a float baseline, its gap."""
    plt = pyplot()
    names = list(dict.fromkeys(point["point"] for point in report["points"]))
    kinds = [("loss", "validation loss (nats per token)")]
    if any(point["gap"] for point in report["points"]):
        kinds.append(("gap", "gap to the float baseline (nats per token)"))
    size = (5 * len(kinds), 1.2 + 0.35 * len(names))
    figure, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (kind, label) in zip(axes[0], kinds, strict=True):
        for linear in dict.fromkeys(point["linear"] for point in report["points"]):
            shown = [p for p in report["points"] if p["linear"] == linear and p[kind]]
            if shown:
                axis.errorbar(
                    [p[kind]["mean"] for p in shown],
                    [names.index(p["point"]) for p in shown],
                    xerr=[p[kind]["error"] or 0.0 for p in shown],
                    fmt="o",
                    capsize=3,
                    color=_COLORS[linear],
                    label=linear,
                )
        axis.set_xlabel(label)
        axis.set_yticks(range(len(names)), names, parse_math=False)
        axis.grid()
        _legend(axis)
    axes[0][0].invert_yaxis()
    return figure


def curves(report: dict[str, Any]) -> Any:
    """The smoothed training loss of every run over its tokens."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    drawn: set[str] = set()
    ends: list[float] = []
    for run in report["runs"]:
        curve, linear = report["curves"][run["run"]], run["linear"]
        tokens, losses = [point[0] for point in curve], [point[1] for point in curve]
        label = None if linear in drawn else linear
        axis.plot(tokens, losses, color=_COLORS[linear], linewidth=1, alpha=0.8, label=label)
        drawn.add(linear)
        ends += losses[len(losses) // 10 :]  # the first steps are far above the rest and would flatten it
    if ends:
        axis.set_ylim(min(ends) - 0.1, max(ends) + 0.1)
    axis.set_xlabel("tokens (millions)")
    axis.set_ylabel("training loss, smoothed (nats per token)")
    axis.grid()
    _legend(axis)
    return figure


def scaling(report: dict[str, Any]) -> Any:
    """Loss against parameters, a line for each kind of linear layers, through the best points of each size.

    Raises BitNetError where all points have one size.
    """
    if len(report["sizes"]) < 2:
        raise BitNetError("sweep: got points of one size, expected at least two for a scaling curve")
    plt = pyplot()
    by_name = {(point["point"], point["linear"]): point for point in report["points"]}
    kinds = ["loss", *(["test_loss"] if any(point["test_loss"] for point in report["points"]) else [])]
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        for linear in dict.fromkeys(point["linear"] for point in report["points"]):
            best = [by_name[size["best"][linear], linear] for size in report["sizes"] if linear in size["best"]]
            shown = [point for point in best if point[kind]]
            if shown:
                axis.errorbar(
                    [point["parameters"] for point in shown],
                    [point[kind]["mean"] for point in shown],
                    yerr=[point[kind]["error"] or 0.0 for point in shown],
                    fmt="o-",
                    capsize=3,
                    color=_COLORS[linear],
                    label=linear,
                )
        axis.set_xscale("log")
        axis.set_xlabel("parameters")
        axis.set_ylabel("test loss (nats per token)" if kind == "test_loss" else "validation loss (nats per token)")
        axis.grid()
        _legend(axis)
    return figure


def _legend(axis: Any) -> None:
    """Place the legend above the picture, where it hides no point; finding a free corner takes a second."""
    if axis.get_legend_handles_labels()[0]:  # where every run diverged there is nothing to name, and pyplot warns
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(LINEARS))
