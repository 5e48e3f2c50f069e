"""The regression check and the page of results, as a person runs them."""

import copy
import html
import json
import random
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import child_process
import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, *args: object) -> CompletedProcess[str]:
    return child_process.run([sys.executable, ROOT / "benchmarks" / name, *args], check=False)


def row(backend: str, speed: float, spread: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": "nano",
        "backend": backend,
        "what": f"what {backend} is",
        "ours": backend == "cpu",
        "threads": 1,
        "test": "tg32",
        "n_prompt": 0,
        "n_gen": 32,
        "model_size": 2_800_000,
        "n_params": 4_200_000,
        "median_ts": speed,
        "avg_ts": speed,
        "stddev_ts": spread * speed,
        "samples_ts": [speed] * 5,
        "first_token_ms": None,
        "bytes_per_token": 2.8e6,
        "macs_per_token": 4.2e6,
        "read_gigabytes_per_second": 2.8e-3 * speed,
        "bandwidth_gigabytes_per_second": 30.0,
        "cached": True,
        "limit_by": "cache",
        "peak_of": "avx512",
        "peak_gigamacs_per_second": 200.0,
        "percent_of_limit": speed / 100,
        "model_memory_bytes": 8e6,
        "load_seconds": 0.1,
        "joules_per_token": None,
        "dollars_per_million": None,
        **changes,
    }


def document(*rows: dict[str, Any], cpu: str = "A CPU") -> dict[str, Any]:
    described = {"cpu": cpu, "cores": 2, "bitnet": "0.1", "torch": "2", "python": "3", "date": "2026-11-21"}
    return {
        "benchmark": "bench",
        "command": ["bitnet", "bench", "--preset", "nano"],
        "machine": described,
        "repetitions": 5,
        "bandwidth_off_median": {"memory": [0.02, 0.04]},
        "steady": True,
        "steady_within": 0.1,
        "stolen": 0.0,
        "notes": [],
        "results": list(rows),
    }


def check(folder: Path, old: dict[str, Any], new: dict[str, Any], *options: object) -> tuple[int, str]:
    for name, content in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text("a line before\n" + json.dumps(content) + "\n")
    done = script("regress.py", folder / "old.json", folder / "new.json", *options)
    return done.returncode, done.stdout + done.stderr


def test_the_same_run_passes(tmp_path: Path) -> None:
    run = document(row("cpu", 1000.0, 0.01), row("torch-bf16", 100.0, 0.01))
    code, out = check(tmp_path, run, run)
    assert code == 0
    assert "SLOWER" not in out


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_another_machine_cancels(factor: float, tmp_path: Path) -> None:
    """Everything by a factor: no change. Ours alone slower by 20 %: a change, on either machine."""
    old = document(row("cpu", 1000.0, 0.01), row("torch-bf16", 100.0, 0.01))
    same = document(row("cpu", 1000.0 * factor, 0.01), row("torch-bf16", 100.0 * factor, 0.01), cpu="another")
    assert check(tmp_path, old, same)[0] == 0
    same["results"][0]["median_ts"] *= 0.8
    code, out = check(tmp_path, old, same)
    assert code == 1
    assert re.search(r"cpu .*torch-bf16 .*-20\.0%.*SLOWER", out)


def test_noise_widens_the_bound(tmp_path: Path) -> None:
    """10 % slower with a spread of 8 %: 3 x 1.25 x 8 % x sqrt(2 / 5) = 19 %."""
    old = document(row("cpu", 1000.0, 0.08), row("torch-bf16", 100.0, 0.0))
    new = copy.deepcopy(old)
    new["results"][0]["median_ts"] = 900.0
    code, out = check(tmp_path, old, new)
    assert code == 0
    bound = float(re.search(r"-10\.0% \|\s+(-[\d.]+)%", out)[1])
    expected = -300 * 1.25 * ((0.08**2 + (80 / 900) ** 2) / 5) ** 0.5
    assert bound == pytest.approx(expected, abs=0.06)
    quiet = document(row("cpu", 1000.0, 0.01), row("torch-bf16", 100.0, 0.0))
    slower = document(row("cpu", 900.0, 0.01), row("torch-bf16", 100.0, 0.0))
    assert check(tmp_path, quiet, slower)[0] == 1
    assert check(tmp_path, quiet, slower, "--floor", 0.2)[0] == 0


@pytest.mark.parametrize(
    ("by", "rate"), [("memory", "bandwidth_gigabytes_per_second"), ("avx512", "peak_gigamacs_per_second")]
)
def test_without_a_reference_the_machine_counts(by: str, rate: str, tmp_path: Path) -> None:
    old = document(row("cpu", 1000.0, 0.01, limit_by=by))
    new = document(row("cpu", 700.0, 0.01, limit_by=by), cpu="another")
    assert check(tmp_path, old, new)[0] == 1
    new["results"][0][rate] *= 0.7
    code, out = check(tmp_path, old, new)
    assert code == 0
    assert f"t/s per {'bandwidth' if by == 'memory' else by}" in out
    # An engine that reads a third more than it did is as near its limit as before, and slower.
    new["results"][0] |= {"median_ts": 525.0, "bytes_per_token": 4e6, "percent_of_limit": 10.0}
    assert check(tmp_path, old, new)[0] == 1
    new["results"][0]["median_ts"] = 700.0
    new["results"][0]["limit_by"] = None
    assert check(tmp_path, old, new)[0] == 2  # two machines and nothing to compare by
    new["machine"]["cpu"] = "A CPU"
    assert check(tmp_path, old, new)[0] == 1  # the same one: 30 % slower


def test_an_unsteady_machine_widens_the_bound(tmp_path: Path) -> None:
    """10 % slower against a bandwidth that varies by 8 % of itself."""
    old, new = (document(row("cpu", speed, 0.0, working_set_bytes=100)) for speed in (1000.0, 900.0))
    assert check(tmp_path, old, new)[0] == 1
    rates = [27.6, 27.6, 30.0, 32.4, 32.4]  # stddev 2.4
    for run in (old, new):
        run["measured"] = [{"model": "nano", "threads": 1, "reads": [{"bytes": 100, "samples": rates}]}]
    code, out = check(tmp_path, old, new)
    assert code == 0
    bound = float(re.search(r"-10\.0% \|\s+(-[\d.]+)%", out)[1])
    assert bound == pytest.approx(-300 * 1.25 * 0.08 * (2 / 5) ** 0.5, abs=0.06)


def test_two_samples_are_noise_and_a_lost_row_is_a_failure(tmp_path: Path) -> None:
    run = document(row("cpu", 1000.0, 0.01), row("cpu", 50.0, 0.01, test="pp512"))
    few = document(row("cpu", 1000.0, 0.0, samples_ts=[1000.0] * 2))
    code, out = check(tmp_path, document(run["results"][0]), few)
    assert (code, "too noisy" in out) == (2, True)
    code, out = check(tmp_path, run, document(run["results"][0]))
    assert (code, "no row nano cpu 1 pp512 in the new run" in out) == (1, True)


def test_slower_comes_before_noisy(tmp_path: Path) -> None:
    """A bound of -40 %, which is noise, and a tenth of the speed, which is not."""
    spread = 0.4 / 3 / 1.25 * (5 / 2) ** 0.5
    old, new = (document(row("cpu", speed, spread)) for speed in (1000.0, 100.0))
    assert check(tmp_path, old, new)[0] == 1


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    run = document(row("cpu", 1000.0, 0.01))
    code, out = check(tmp_path, run, document(row("cpu", 1000.0, 0.01, model="mini")))
    assert (code, "share no row" in out) == (2, True)
    code, out = check(tmp_path, document(row("cpu", 1000.0, 0.5)), document(row("cpu", 1000.0, 0.5)))
    assert (code, "too noisy" in out) == (2, True)
    (tmp_path / "x.json").write_text("{}")
    done = script("regress.py", tmp_path / "x.json", tmp_path / "nowhere.json")
    assert done.returncode == 2
    assert done.stderr.startswith("regress: error: ")


def test_stored_runs_of_one_command_are_compared() -> None:
    """Indented as they were stored, too."""
    again = sorted((ROOT / "benchmarks" / "results").glob("*-bench-again-*.json"))
    assert len(again) == 3
    for new in again[1:]:
        done = script("regress.py", again[0], new)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("| small |") == 4


def test_another_device_is_no_reference(tmp_path: Path) -> None:
    rows = [row("triton", 100.0, 0.01, device="cuda:0", ours=True), row("torch-bf16", 10.0, 0.01)]
    halved = [row("triton", 50.0, 0.01, device="cuda:0", ours=True), row("torch-bf16", 5.0, 0.01)]
    for name, found in (("old", rows), ("new", halved)):
        (tmp_path / name).write_text(json.dumps(document(*found)))
    done = script("regress.py", tmp_path / "old", tmp_path / "new")
    assert done.returncode == 1, done.stdout + done.stderr  # against the CPU's half speed it would pass
    assert "triton on cuda:0" in done.stdout


LEFT_OUT = {"left_out": "0.03 GMAC/s here", "median_ts": None, "samples_ts": None, "stddev_ts": None, "limit_by": None}


def test_rows_that_were_left_out_are_not_compared(tmp_path: Path) -> None:
    ours, other = row("cpu", 1000.0, 0.01), row("torch-int8", 500.0, 0.01)
    code, out = check(tmp_path, document(ours, other), document(ours, other | LEFT_OUT))
    assert code == 0, out
    assert "torch-int8" not in out  # the machine takes its place
    code, out = check(tmp_path, document(ours, row("torch", 9.0, 0.01) | LEFT_OUT | {"ours": True}), document(ours))
    assert code == 0, out
    code, out = check(tmp_path, document(ours, row("torch", 9.0, 0.01, ours=True)), document(ours))
    assert code == 1
    code, out = check(tmp_path, document(ours | LEFT_OUT), document(ours))
    assert code == 2
    assert "got a result of" in out


def test_a_page_of_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    value = random.randint(10**6, 10**7)
    results, out = tmp_path / "results", tmp_path / "page"
    results.mkdir()
    run = document(row("cpu", 1234.5, 0.01), row("torch-bf16", 77.25, 0.01), row("cpu", 99.0, 0.01, threads=2))
    left_out = row("torch-int8", 1.0, 0.1) | dict.fromkeys(("bytes_per_token", "percent_of_limit")) | LEFT_OUT
    run["results"].append(left_out)
    (results / "2026-11-21-bench.json").write_text("words\n" + json.dumps(run))
    (results / "2026-11-20-other.json").write_text(
        json.dumps(
            {
                "machine": {"cpu": "Some <CPU>"},
                "count": value,
                "rows": [{"name": "a|b", "kl": 1e-5}, {"name": "c", "kl": 2.5}],
            }
        )
    )
    (results / "2026-11-20-other-size.svg").write_text("<svg/>")
    done = script("report.py", results, "-o", out)
    assert done.returncode == 0, done.stderr
    text, page = ((out / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert text.index("2026-11-21-bench") < text.index("2026-11-20-other")  # the newest first
    for part in (
        "1,234",
        "77.2",
        f"{value:,}",
        "bitnet bench --preset nano",
        "A CPU, 2 cores",
        "what torch-bf16 is",
        "0.03 GMAC/s here",
    ):
        assert part in text
        assert part in page
    assert r"a\|b" in text
    assert html.escape("Some <CPU>") in page
    assert "<CPU>" not in page
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 3
    assert all((out / name).is_file() and f'src="{name}"' in page for name in pictures)


@pytest.mark.slow
def test_a_page_of_the_stored_results(tmp_path: Path) -> None:
    """Whatever lies in benchmarks/results can be shown."""
    pytest.importorskip("matplotlib")
    done = script("report.py", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    stored = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert text.count("\n## ") == len(stored) > 0
    assert all(f"- [{path.stem}](#{path.stem})\n" in text for path in stored)  # the contents


def test_a_page_shows_a_comparison_first_and_a_long_row_downwards(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    results.mkdir()
    (results / "2026-11-21-a.json").write_text(json.dumps({"counts": {f"kind {i}": 1000 + i for i in range(13)}}))
    stored = ROOT / "benchmarks" / "results" / "2026-11-21-compare.json"
    compared = json.loads(stored.read_text())
    failed = compared["results"][0] | {"status": "missing", "title": "A method", "note": "pip install it"}
    (results / "2026-11-21-b.json").write_text(json.dumps(compared | {"results": [*compared["results"], failed]}))
    done = script("report.py", results, "-o", tmp_path / "page")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page" / "report.md").read_text()
    assert text.index("## 2026-11-21-b") < text.index("## 2026-11-21-a")
    assert re.search(r"\| kind 12 +\| +1,012 \|", text)
    rows = [line for line in text.splitlines() if line.startswith("| BitNet b1.58")]
    assert len(rows) == sum(row["title"].startswith("BitNet b1.58") for row in compared["results"])
    assert re.search(r"\| A method +\| pip install it +\|", text)


@pytest.mark.parametrize("content", [None, "no JSON"])
def test_no_page(content: str | None, tmp_path: Path) -> None:
    if content:
        (tmp_path / "x.json").write_text(content)
    done = script("report.py", tmp_path, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
