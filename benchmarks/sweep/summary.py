"""What came of the runs of a sweep: means and spreads over seeds, gaps to the float twin, the best of each size."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What came of one run: figures of the whole validation split after the last step, and of the test text."""

    point: str
    linear: str
    seed: int
    run: str
    parameters: int
    steps: int
    tokens: int
    loss: float | None = None  # nats a token; None where the run diverged
    bits_per_byte: float | None = None
    test_loss: float | None = None  # None where there is no test text, too
    test_bits_per_byte: float | None = None
    test_bits_per_byte_error: float | None = None  # from window to window of the text, within one model
    weights: int | None = None  # parameters less the gains of norms; files of older versions lack it

    @property
    def size(self) -> int:
        """Equal for runs of one shape, whatever their linears and norms: those are what is tuned."""
        return self.parameters if self.weights is None else self.weights


FIGURES = ("loss", "bits_per_byte", "test_loss", "test_bits_per_byte")  # of a point; each with its gap


Groups = dict[tuple[str, str], list[Result]]  # by point and linears


def summarize(results: list[Result]) -> dict[str, Any]:
    """Every run; of each point and linear mean and standard error over seeds, and the gap to the float twin; sizes.

    A gap is paired: the twin of a run has its seed, and `pairs` says how many there are.
    """
    groups: Groups = {}
    for result in results:
        groups.setdefault((result.point, result.linear), []).append(result)
    points = [_point(mine, groups.get((point, "float"), [])) for (point, _), mine in groups.items()]
    sizes = [_size(size, points, groups) for size in sorted({result.size for result in results})]
    return {"points": points, "sizes": sizes, "runs": [asdict(result) for result in results]}


def summarized_anew(report: dict[str, Any]) -> dict[str, Any]:
    """A stored report with points and sizes as this version has them: those of its runs."""
    return {**report, **summarize([Result(**run) for run in report["runs"]])}


def _point(mine: list[Result], twins: list[Result]) -> dict[str, Any]:
    """The runs of one point and linear, and how far they are from their twins."""
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
        **_gaps(mine, twins if mine[0].linear != "float" else []),
    }


def _size(size: int, points: list[dict[str, Any]], groups: Groups) -> dict[str, Any]:
    """Of one size the best point of each kind of linears, and the gaps with each kind at its best.

    So no badly set twin flatters. `tried` says out of how many points the best was taken: a kind that was tried more
    often does better for that alone. The choice is by validation, never by the test text.
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


def _gaps(runs: list[Result], twins: list[Result]) -> dict[str, Any]:
    """Of every figure the mean difference of runs to the twins with their seeds."""
    gaps: dict[str, Any] = {}
    for name in FIGURES:
        ours, theirs = ({r.seed: getattr(r, name) for r in side} for side in (runs, twins))
        differences = _differences(ours, theirs)
        gaps.setdefault("pairs", len(differences))  # by the first figure, which every run has that did not diverge
        gaps[_gap(name)] = mean_and_error(differences)
    return gaps


def _gap(name: str) -> str:
    """loss -> gap, test_bits_per_byte -> test_bits_per_byte_gap."""
    return name.replace("loss", "gap") if "loss" in name else f"{name}_gap"


def _differences(mine: dict[int, float | None], twins: dict[int, float | None]) -> list[float]:
    pairs = ((loss, twins.get(seed)) for seed, loss in mine.items())
    return [loss - twin for loss, twin in pairs if loss is not None and twin is not None]


def mean_and_error(values: list[float]) -> dict[str, float | None] | None:
    """Mean and standard error; no error for one value, nothing for none."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error}
