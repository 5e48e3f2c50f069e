"""One tiny run of `bitnet bench`: its rows, tables and pictures."""

import csv
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import TINY

from bitnet.benchmarks.bench import command, limits, machine, table
from bitnet.benchmarks.bench.limits import ModelBytes
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.rows import off_median
from bitnet.cli import main
from bitnet.kernels import native

_SMALL = 8 * 2**20  # bytes read as the memory: half a GB takes its time


REQUIRED = ("test", "avg_ts", "stddev_ts", "threads", "backend", "bytes_per_token", "percent_of_limit")


@pytest.fixture(scope="module")
def ran(tiny_model: Path) -> tuple[dict[str, Any], str]:
    """A whole run on a tiny model, as the command line prints it, and what it said meanwhile."""
    backends = "torch" if native.why_not() else "cpu,torch"
    args = ["bench", "-m", str(tiny_model), "-p", "8", "-n", "4", "--pg", "6,3", "-d", "0,5", "-t", "1", "-r", "2"]
    args += ["--backend", backends, "--against", "torch-bf16,torch-int8", "--price", "2", "-o", "json"]
    return measured(args)


def measured(args: list[str]) -> tuple[dict[str, Any], str]:
    """The document that a command line prints, and its stderr; with a small set read as the memory."""
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(sys, "argv", ["bitnet", *args])
        patch.setattr(machine, "MEMORY", _SMALL)
        assert main(args) == 0, err.getvalue()
    found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return found, err.getvalue()


@pytest.fixture(scope="module")
def document(ran: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return ran[0]


def test_the_first_figure_of_each_row_is_logged(ran: tuple[dict[str, Any], str]) -> None:
    document, said = ran
    lines = [line for line in said.splitlines() if "tokens/s, round 1 of 2" in line]
    expected = {f"{row['test']} on {row['backend']}: " for row in document["results"]}
    assert len(lines) == len(expected)
    assert all(any(part in line for line in lines) for part in expected)


@pytest.mark.slow
def test_every_contender_runs_every_test(document: dict[str, Any]) -> None:
    rows = document["results"]
    backends = {"torch", "torch-bf16", "torch-int8"} | ({"cpu"} if native.why_not() is None else set())
    tests = {f"{kind}{depth}" for kind in ("pp8", "tg4", "pp6+tg3") for depth in ("", " @ d5")}
    assert len(rows) == len(backends) * len(tests)
    assert {(row["backend"], row["test"]) for row in rows} == set(itertools.product(backends, tests))
    assert {row["threads"] for row in rows} == {1}


def test_rows_have_all_figures(document: dict[str, Any]) -> None:
    for row in document["results"]:
        assert (row["left_out"], row["remark"]) == (None, None)
        assert all(row[key] is not None for key in REQUIRED)
        assert len(row["samples_ts"]) == 2
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert row["percent_of_limit"] == pytest.approx(100 * row["median_ts"] / row["limit_ts"])
        assert row["dollars_per_million"] == pytest.approx(2 / 3600 / row["median_ts"] * 1e6)
        assert (row["first_token_ms"] is None) == (row["n_prompt"] == 0)
        assert row["peak_memory_bytes"] > 0
        assert row["device"] == "cpu"
        assert row["own_peak_of"] == "torch bf16" or row["peak_of"] != "torch bf16"
        assert (row["peak_gigamacs_per_second"] or 0) >= (row["own_peak_gigamacs_per_second"] or 0)
        expected = limits.work(
            TINY,
            ModelBytes(row["model_size"], row["bytes_per_token"]),  # only the sizes of a test are asked of it
            Test(row["n_prompt"], row["n_gen"], row["n_depth"], row["n_batch"]),
        )
        assert row["macs_per_token"] == pytest.approx(expected.macs)


def test_the_machine_is_measured_before_between_and_after(document: dict[str, Any]) -> None:
    (measured,) = document["measured"]
    assert _SMALL in [read["bytes"] for read in measured["reads"]]
    assert all(len(read["samples"]) == 4 for read in measured["reads"])  # before, and after each of three rounds
    assert document["steady"] == (document["bandwidth_off_median"]["memory"][0] <= 0.1)
    assert all(rate is None or rate > 0 for rate in measured["gigamacs_per_second"].values())


def test_the_command_is_kept_without_folders(document: dict[str, Any], tiny_model: Path) -> None:
    assert document["command"][:3] == ["bitnet", "bench", "-m"]
    assert document["command"][3] == tiny_model.name
    assert str(tiny_model.parent) not in json.dumps(document)


def test_tables_show_all_rows(document: dict[str, Any]) -> None:
    rows = document["results"]
    lines = table.as_markdown(document).splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:3] == ["model", "backend", "test"]
    assert "t/s" in header
    assert "J/token" not in header or any(row["joules_per_token"] for row in rows)
    assert sum(line.startswith("| tiny") for line in lines) == len(rows)
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # columns line up
    read = list(csv.DictReader(io.StringIO(table.as_csv(rows))))
    assert [row["test"] for row in read] == [row["test"] for row in rows]
    assert float(read[0]["avg_ts"]) == rows[0]["avg_ts"]


def test_one_disturbed_sample_is_reported_and_changes_no_verdict() -> None:
    assert off_median([100, 102, 99, 30, 101, 100, 98]) == (pytest.approx(0.02), pytest.approx(0.7))
    assert off_median([100, 50, 99, 30, 101, 100, 98]) == (pytest.approx(49 / 99), pytest.approx(69 / 99))
    assert off_median([5.0]) == (0, 0)


def test_an_unsteady_machine_is_reported(document: dict[str, Any]) -> None:
    """By its memory; what caches did is shown, and gives no verdict: neighbours share them."""
    shaken = document | {"steady": False, "bandwidth_off_median": {"memory": (0.37, 0.5), "smaller": (0.1, 0.7)}}
    shown = "\n".join(table.notes(shaken))
    assert "37.0% (50%) in memory, 10.0% (70%) in smaller sets" in shown
    assert "unsteady" in shown
    assert "unsteady" not in "\n".join(table.notes(shaken | {"steady": True}))


def test_spreads_are_those_of_memory_and_of_caches() -> None:
    def read(of: str, off: float, worst: float) -> dict[str, Any]:
        return {"of": of, "off_median": off, "worst_off_median": worst}

    one = {"reads": [read("memory", 0.01, 0.3), read("smaller", 0.02, 0.1)]}
    two = {"reads": [read("smaller", 0.4, 0.09), read("memory", 0.03, 0.05)]}
    assert command.bandwidth_spread([one, two]) == {"memory": (0.03, 0.3), "smaller": (0.4, 0.1)}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(document: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    plot = pytest.importorskip("bitnet.benchmarks.bench.plot")
    pytest.importorskip("matplotlib")
    paths = plot.draw(document, tmp_path / f"run{suffix}")
    assert [path.name for path in paths] == [f"run-roofline{suffix}", f"run-comparison{suffix}"]
    for path in paths:
        content = path.read_bytes()
        if suffix == ".svg":
            assert all(row["backend"].encode() in content for row in document["results"])
        else:
            assert content.startswith(b"\x89PNG")
            assert len(content) > 10_000
