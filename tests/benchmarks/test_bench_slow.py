"""What `bitnet bench` does with contenders that hang, CPUs without a fast kernel, and a busy machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import TINY, contender, rows_of, series_of

from bitnet.benchmarks.bench import command, machine, measure, series, table
from bitnet.benchmarks.bench import rows as bench_rows
from bitnet.benchmarks.bench.contenders import Files
from bitnet.benchmarks.bench.device_meter import DeviceMeter
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.random_model import write_random
from bitnet.benchmarks.bench.rows import Subject
from bitnet.benchmarks.bench.series import Budget
from bitnet.benchmarks.children import process
from bitnet.benchmarks.children.process import Child
from bitnet.cli import main
from bitnet.errors import BitNetError

AMD = {
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"
}  # what oneDNN uses of a CPU that has AVX-512, VNNI and BF16, but no AMX


SLOW = """
import time
class Slow:
    def __init__(self, mode):
        if mode == "never loads":
            time.sleep(600)
        self.mode = mode
        self.facts = {"what": mode, "backend": mode, "weight_bytes": 1000, "kv_bytes": 1.0, "peak": "torch fp32"}
    def start(self, batch, depth, capacity): pass
    def prefill(self, tokens): pass
    def decode(self, tokens):
        if self.mode == "never writes":
            time.sleep(600)
load = Slow
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Process numbers by name; what never ends has a short limit and everything else a long one."""
    found: dict[str, int] = {}

    class Limited(Child):
        def __init__(self, name: str, *args: Any, **options: Any) -> None:
            super().__init__(name, *args[:5], limit=0.2 if name == "never loads" else 600.0)
            found[name] = self._process.pid

        def ask(self, do: str, limit: float, **command: Any) -> dict[str, Any]:
            return super().ask(do, 0.2 if self.name == "never writes" else 600.0, **command)

    monkeypatch.setattr(series, "Child", Limited)
    return found


def test_a_contender_that_hangs_is_a_row_and_others_keep_their_figures(
    started: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setattr(machine, "MEMORY", 2**20)
    names = ("well", "never loads", "never writes")
    lined_up = [
        contender(name, script=str(tmp_path / "slow"), options=lambda files, threads, name=name: {"mode": name})
        for name in names
    ]
    said: list[str] = []
    rows, reports = measure.group(
        Subject("tiny", TINY, 1, "tiny"),
        Files(*[tmp_path / "none"] * 3),
        lined_up,
        [Test(0, 3)],
        1,
        2,
        Budget(),
        lambda text: None,
        said.append,
    )
    found = {row["backend"]: row for row in rows}
    assert set(found) == {*names}
    assert len(found["well"]["samples_ts"]) == 2
    assert found["well"]["left_out"] is None
    assert found["never loads"]["left_out"] == "not loaded within 300 s"
    assert "ended after" in found["never writes"]["left_out"]
    assert all(found[name]["median_ts"] is None for name in names[1:])
    assert [line.partition(" on ")[2].partition(":")[0] for line in said] == ["well"]
    assert reports[0]["gigamacs_per_second"] == {}  # nothing but answers: no peak is needed
    for name in ("well", "never writes"):
        assert not Path(f"/proc/{started[name]}").exists()


def verbose(code: str, **environment: str) -> str:
    """What oneDNN says it runs."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "ONEDNN_VERBOSE": "1", **environment},
    )
    return done.stdout


def has_amx_only_int8() -> bool:
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False


PREPACKED = """
import torch
from bitnet import dense_products
way = dense_products.ways("int8")[0]
x, w = dense_products.operands("int8", 16, 256, 256)
way.make(w)(x)
"""


@pytest.mark.skipif(not has_amx_only_int8(), reason="needs a CPU with AVX512-BF16 to be limited to it")
def test_a_cpu_without_amx_runs_reference_code() -> None:
    """The case that is emulated below is the real one: oneDNN's own name for it."""
    assert "matmul,ref_int8" in verbose(PREPACKED, **AMD)


def test_bench_on_a_cpu_without_amx_ends_and_takes_the_faster_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in AMD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "MEMORY", 2**20)
    write_random(TINY, tmp_path / "m.safetensors")
    args = ["bench", "-m", str(tmp_path / "m.safetensors"), "--backend", "torch", "--against", "torch-int8"]
    args += ["-p", "20", "-n", "3", "-t", "1", "-r", "1", "-q", "-o", "json"]
    monkeypatch.setattr(sys, "argv", ["bitnet", *args])
    assert main(args) == 0
    document = json.loads(capsys.readouterr().out)
    rivals = [row for row in document["results"] if row["backend"] == "torch-int8"]
    assert len(rivals) == 2
    for row in rivals:
        if row["left_out"]:
            assert "GMAC/s here" in row["left_out"]
        else:
            assert "torch._int_mm" in row["what"]
    if has_amx_only_int8():
        assert all("onednn.qlinear_pointwise runs reference code here" in row["what"] for row in rivals)
        assert document["measured"][0]["gigamacs_of"].get("torch int8") in (None, "_int_mm")


def test_nothing_measured_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = series_of(0.0, 100.0, Budget(row=1))
    test = Test(0, 3)
    one.calibrate([test])
    row = bench_rows.row(
        Subject("tiny", TINY, 1, "tiny"), one, DeviceMeter("cpu", lambda: pytest.fail("asked")), test, 1, 2
    )
    monkeypatch.setattr(measure, "group", lambda *args: ([row], []))
    write_random(TINY, tmp_path / "m.safetensors")
    monkeypatch.setattr(sys, "argv", ["bitnet", "bench"])
    assert main(["bench", "-m", str(tmp_path / "m.safetensors"), "-t", "1"]) == 2


def left_out_beside(tests: list[Test]) -> list[dict[str, Any]]:
    quick, _ = series_of(0.01, 0.01, Budget(row=60))
    slow, _ = series_of(5.0, 5.0, Budget(row=60))
    rows = []
    for one, name in ((quick, "quick"), (slow, "slow")):
        one.facts["backend"] = name
        one.calibrate(tests)
        for test in tests:
            if one.has_time_for(test):
                one.warm_up(test, tests)
                one.run(test, tests)
            rows.append(rows_of(one, test, repetitions=1))
    return rows


def test_tables_show_what_was_left_out() -> None:
    rows = left_out_beside([Test(0, 30)])
    assert [row["left_out"] is None for row in rows] == [True, False]
    lines = table.results_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "remark" in lines[0]
    assert "left out" in lines[3]
    assert "would take 150 s of its 60" in lines[3]
    header, *cells = table.as_csv(rows).splitlines()
    assert "left_out" in header.split(",")
    assert "would take 150 s" in cells[1].replace('"', "")
    assert set(rows[0]) == set(rows[1])
    assert json.loads(json.dumps(rows)) == rows


def test_pictures_omit_rows_that_were_left_out(tmp_path: Path) -> None:
    plot = pytest.importorskip("bitnet.benchmarks.bench.plot")
    pytest.importorskip("matplotlib")
    rows = left_out_beside([Test(8, 0), Test(0, 30)])
    for path in plot.draw({"results": rows}, tmp_path / "run.svg"):
        content = path.read_text()
        assert "quick" in content
        assert "slow" not in content


@pytest.mark.parametrize(
    ("others", "busy"), [(0.1, False), (1.3, True), (None, False)], ids=["quiet", "busy", "unknown"]
)
def test_a_busy_machine_is_reported(others: float | None, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "busy", lambda cpus: others)
    monkeypatch.setattr(command, "load", lambda: 2.5)
    shown = command.load_of([0, 1])
    assert shown == {"others": others, "cpus": 2, "average": 2.5, "busy": busy}
    if others is not None:
        line = table.load_line(shown)
        assert line.startswith("a busy machine") == busy
        assert f"{others:.1f} of 2 CPUs busy; load average 2.5" in line


def test_bench_warns_of_a_busy_machine_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> Any:
        raise BitNetError("measuring begins")

    monkeypatch.setattr(command, "busy", lambda cpus: 0.9 * len(cpus))
    monkeypatch.setattr(measure, "group", stop)
    monkeypatch.setattr(sys, "argv", ["bitnet", "bench"])
    write_random(TINY, tmp_path / "m.safetensors")
    assert main(["bench", "-m", str(tmp_path / "m.safetensors"), "-t", "1"]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "a busy machine" in first
    assert "measuring begins" in second


@pytest.mark.parametrize(("words", "row", "load"), [([], 120, 300), (["--budget", "900"], 900, 900)])
def test_the_budget_is_an_option(words: list[str], row: float, load: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Budget] = []

    def run(settings: command.Settings, *args: Any) -> Any:
        seen.append(settings.budget)
        raise BitNetError("enough")

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(sys, "argv", ["bitnet", "bench", *words])
    assert main(["bench", *words]) == 2
    assert [(one.row, one.load) for one in seen] == [(row, load)]
    assert process.LOAD == 300
