"""The figures of a sweep: means, gaps, the best points of each size; in tables and pictures."""

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from bitnet.benchmarks.sweep.plot import plot_curves, plot_scaling, plot_sweep
from bitnet.benchmarks.sweep.summary import Result, mean_and_error, summarize, summarize_again
from bitnet.benchmarks.sweep.table import sweep_cells, sweep_table, tuned_gaps

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def result(point: str, linear: str, seed: int, loss: float | None, size: int = 1000, **more: Any) -> Result:
    more = {"weights": size, "parameters": size, **more}
    return Result(point, linear, seed, f"{point}-{linear}-s{seed}", steps=4, tokens=512, loss=loss, **more)


def test_mean_and_error() -> None:
    values = [random.random() for _ in range(5)]
    found = mean_and_error(values)
    assert found is not None
    assert found["mean"] == pytest.approx(sum(values) / 5)
    assert found["error"] == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert mean_and_error([2.0]) == {"mean": 2.0, "error": None}
    assert mean_and_error([]) is None


def test_each_size_has_its_own_best_points_and_gaps() -> None:
    """Two sizes; gains of norms make none; the larger float models would beat all; seeds that only one kind has."""
    small = [
        result("a", "ternary", 1, 3.5),
        result("a", "ternary", 2, 3.7),
        result("b", "ternary", 1, 3.3, parameters=1010),
        result("b", "ternary", 2, 3.4, parameters=1010),
        result("c", "ternary", 1, 3.0),
        result("c", "ternary", 2, None),  # better than b, and not to be relied on
        result("a", "float", 2, 3.1),
        result("a", "float", 3, 2.9),
        result("d", "binary", 1, None),
    ]
    large = [
        result("big", "ternary", 1, 2.9, 2000),
        result("big", "float", 1, 2.5, 2000),
        result("big too", "float", 1, 2.6, 2000),
        result("big", "binary", 4, 2.7, 2000),
    ]
    results = [*small, *large]
    random.shuffle(results)
    report = summarize(results)
    first, second = report["sizes"]
    assert (first["size"], second["size"]) == (1000, 2000)
    assert first["tried"] == {"ternary": 3, "float": 1, "binary": 1}
    assert first["best"] == {"ternary": "b", "float": "a"}
    assert first["tuned_gaps"].keys() == {"ternary"}
    gap = first["tuned_gaps"]["ternary"]
    assert gap["pairs"] == 1  # seed 2
    assert gap["gap"] == {"mean": pytest.approx(3.4 - 3.1), "error": None}
    assert second["tried"] == {"ternary": 1, "float": 2, "binary": 1}
    assert second["best"] == {"ternary": "big", "float": "big", "binary": "big"}
    assert second["tuned_gaps"]["ternary"]["gap"]["mean"] == pytest.approx(0.4)
    assert second["tuned_gaps"]["binary"]["pairs"] == 0
    lines = {line.split(" (")[0]: line for line in tuned_gaps(report)}
    assert len(lines) == 3
    assert lines["0.00101M parameters, ternary at b"].endswith(
        "(best of 3) against float at a (best of 1), 1 pair of runs: +0.3000 nats per token on the validation text"
    )
    assert lines["0.002M parameters, binary at big"].endswith("0 pairs of runs: no gap")
    marks = {(row[0], row[1]): row[-1] for row in sweep_cells(report)[1]}
    assert marks["b", "ternary"] == "best ternary"
    assert marks["big", "float"] == "best float"
    assert marks["c", "ternary"] == "1 diverged"
    assert marks["a", "float"] == marks["big", "ternary"] == ""  # the only one is no choice


def test_the_test_text_chooses_nothing() -> None:
    """The best by validation is the worst on the test text, for both kinds."""
    results = [
        result(point, linear, 1, loss, test_loss=test, test_bits_per_byte=test / 2)
        for point, linear, loss, test in (
            ("a", "ternary", 3.0, 4.9),
            ("b", "ternary", 3.1, 3.2),
            ("a", "float", 2.9, 2.95),
            ("b", "float", 2.8, 3.9),
        )
    ]
    (size,) = summarize(results)["sizes"]
    assert size["best"] == {"ternary": "a", "float": "b"}
    gaps = size["tuned_gaps"]["ternary"]
    assert gaps["gap"]["mean"] == pytest.approx(3.0 - 2.8)
    assert gaps["test_gap"]["mean"] == pytest.approx(4.9 - 3.9)
    assert gaps["test_bits_per_byte_gap"]["mean"] == pytest.approx((4.9 - 3.9) / 2)


@pytest.mark.parametrize("plain", [[], [result("a", "float", 1, 2.8), result("a", "float", 2, 2.9)]])
@pytest.mark.parametrize("loss", [3.0, None])
def test_points_without_a_baseline_in_tables_and_pictures(
    plain: list[Result], loss: float | None, tmp_path: Path
) -> None:
    """With none at all, and where only one of the points has one; also where all of its runs diverged."""
    alone = [result("alone", "ternary", seed, loss and loss + seed) for seed in (1, 2)]
    large = [result("large", "ternary", seed, loss, 2000) for seed in (1, 2)]
    both = [result("a", "ternary", seed, 3.1 + seed) for seed in (1, 2)] if plain else []
    report = summarize([*alone, *both, *plain, *large])
    points = {(point["point"], point["linear"]): point for point in report["points"]}
    assert points["alone", "ternary"]["gap"] is None
    assert points["alone", "ternary"]["pairs"] == 0
    header, rows = sweep_cells(report)
    assert ("gap to float" in header) == bool(plain)
    assert all(len(row) == len(header) for row in rows)
    assert len(tuned_gaps(report)) == bool(plain)
    sweep_table(report)
    report["curves"] = {run["run"]: [[1.0, 3.0]] if run["loss"] else [] for run in report["runs"]}
    pytest.importorskip("matplotlib")
    drawn = plot_sweep(report, tmp_path / "sweep") + plot_curves(report, tmp_path / "curves")
    drawn += plot_scaling(report, tmp_path / "scaling")
    assert len(drawn) == 6
    assert all(path.stat().st_size for path in drawn)


def test_a_stored_report_of_an_older_version() -> None:
    """Its best points and gaps were in another shape, and are those that its runs give now."""
    stored = json.loads((BENCHMARKS / "results" / "2026-11-22-ladder-rates.json").read_text())
    assert "sizes" not in stored
    report = summarize_again(stored)
    (size,) = report["sizes"]
    assert size["tried"] == {"ternary": 4, "float": 4, "binary": 4}
    assert size["best"] == {linear: best["point"] for linear, best in stored["best"].items()}
    for linear, gaps in stored["tuned_gaps"].items():
        assert size["tuned_gaps"][linear] == {"pairs": 1, **gaps}
    for now, then in zip(report["points"], stored["points"], strict=True):
        assert {key: now[key] for key in then} == then
    assert report["machine"] == stored["machine"]
    assert summarize_again(json.loads(json.dumps(report))) == report
