"""The figures of a sweep: means and standard errors over seeds, gaps to the float baseline, the best of each size."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitnet.train.report.plot import smooth

CURVE_POINTS = 64  # of a run's curve: twice as many as the smoothing leaves independent


@dataclass(frozen=True)
class Result:
    """The figures of one run: on the complete validation split after the last step, and on the test text."""

    point: str
    linear: str
    seed: int
    run: str
    parameters: int
    steps: int
    tokens: int
    loss: float | None = None  # nats per token; None where the run diverged
    bits_per_byte: float | None = None
    test_loss: float | None = None  # None also where there is no test text
    test_bits_per_byte: float | None = None
    test_bits_per_byte_error: float | None = None  # over windows of the text, within one model
    weights: int | None = None  # parameters without the gains of norms; missing from files of older versions

    @property
    def size(self) -> int:
        """Equal for runs of one shape, whatever their linear layers and norms, which a sweep may vary."""
        return self.parameters if self.weights is None else self.weights


FIGURES = ("loss", "bits_per_byte", "test_loss", "test_bits_per_byte")  # of a point; each with its gap
Groups = dict[tuple[str, str], list[Result]]  # by point and kind of linear layers


def summarize(results: list[Result]) -> dict[str, Any]:
    """Points (mean and standard error over seeds, gap to the float baseline), sizes (the best points), and all runs.

    A gap is paired: the baseline of a run has its seed, and `pairs` counts the pairs.
    """
    groups: Groups = {}
    for result in results:
        groups.setdefault((result.point, result.linear), []).append(result)
    points = [_point(mine, groups.get((point, "float"), [])) for (point, _), mine in groups.items()]
    sizes = [_size(size, points, groups) for size in sorted({result.size for result in results})]
    return {"points": points, "sizes": sizes, "runs": [asdict(result) for result in results]}


def summarize_again(report: dict[str, Any]) -> dict[str, Any]:
    """A stored report with the points and sizes that this version computes from its runs."""
    return {**report, **summarize([Result(**run) for run in report["runs"]])}


def curve(metrics: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The smoothed training loss of a run: at most CURVE_POINTS of [tokens in millions, nats per token].

    metrics: its rows in metrics.jsonl.
    """
    rows = [row for row in metrics if "loss" in row]
    losses = smooth([row["loss"] for row in rows])
    count = min(CURVE_POINTS, len(rows))
    kept = [round(i * (len(rows) - 1) / max(1, count - 1)) for i in range(count)]
    return [[round(rows[i]["tokens"] / 1e6, 4), round(losses[i], 4)] for i in kept]


def _point(mine: list[Result], baselines: list[Result]) -> dict[str, Any]:
    """The runs of one point and kind of linear layers, and their gaps."""
    figures = {name: mean_and_error([v for r in mine if (v := getattr(r, name)) is not None]) for name in FIGURES}
    return {
        "point": mine[0].point,
        "linear": mine[0].linear,
        "parameters": mine[0].parameters,
        "size": mine[0].size,
        "tokens": mine[0].tokens,
        "seeds": len(mine),
        "diverged": sum(r.loss is None for r in mine),
        **figures,
        **_gaps(mine, baselines if mine[0].linear != "float" else []),
    }


def _size(size: int, points: list[dict[str, Any]], groups: Groups) -> dict[str, Any]:
    """The best point of each kind of linear layers at one size, and the gaps with each kind at its best.

    A badly tuned baseline would flatter the others. `tried` counts the points among which the best was chosen: a kind
    with more tries does better for that alone. The choice is by validation loss, never by the test text.
    """
    mine = [point for point in points if point["size"] == size]
    tried = {linear: [p for p in mine if p["linear"] == linear] for linear in dict.fromkeys(p["linear"] for p in mine)}
    sound = {linear: [p for p in all_ if p["loss"] and not p["diverged"]] for linear, all_ in tried.items()}
    best = {linear: min(some, key=lambda p: p["loss"]["mean"])["point"] for linear, some in sound.items() if some}
    gaps = {
        linear: _gaps(groups[point, linear], groups[best["float"], "float"])
        for linear, point in best.items()
        if linear != "float" and "float" in best
    }
    return {
        "size": size,
        "tried": {linear: len(all_) for linear, all_ in tried.items()},
        "best": best,
        "tuned_gaps": gaps,
    }


def _gaps(runs: list[Result], baselines: list[Result]) -> dict[str, Any]:
    """The mean difference of every figure between runs and the baselines with their seeds."""
    gaps: dict[str, Any] = {}
    for name in FIGURES:
        ours, theirs = ({r.seed: getattr(r, name) for r in side} for side in (runs, baselines))
        differences = _differences(ours, theirs)
        gaps.setdefault("pairs", len(differences))  # by the first figure: every run that did not diverge has it
        gaps[_gap(name)] = mean_and_error(differences)
    return gaps


def _gap(name: str) -> str:
    """loss -> gap, test_bits_per_byte -> test_bits_per_byte_gap."""
    return name.replace("loss", "gap") if "loss" in name else f"{name}_gap"


def _differences(ours: dict[int, float | None], theirs: dict[int, float | None]) -> list[float]:
    pairs = ((value, theirs.get(seed)) for seed, value in ours.items())
    return [value - other for value, other in pairs if value is not None and other is not None]


def mean_and_error(values: list[float]) -> dict[str, float | None] | None:
    """Mean and standard error; the error is None for a single value, and both are for none."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}
