"""`bitnet compare`: which runs it compares, methods without figures, and one complete run on a tiny pair."""

import io
import json
import signal
import sys
import time
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import child_process
import numpy as np
import pytest
import torch
from compare_runs import TEXT, train

from bitnet.benchmarks.children import builds, process
from bitnet.benchmarks.compare import command, jobs
from bitnet.benchmarks.compare.artifact import Artifact
from bitnet.benchmarks.compare.method import Settings
from bitnet.benchmarks.compare.models import open_model
from bitnet.benchmarks.compare.pair import Pair, find_baseline
from bitnet.benchmarks.compare.plot import plot_comparison
from bitnet.benchmarks.compare.registry import choose, registry
from bitnet.benchmarks.compare.table import comparison_tables
from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.train.data.windows import spread_windows
from bitnet.train.runs.run import Run

SETTINGS = Settings(threads=1, qat_steps=1, calibration=2)


def test_runs_that_cannot_be_compared_are_refused(runs: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    assert pair.check()["steps"] == 1
    assert find_baseline(pair.ternary) == pair.baseline.resolve()
    longer = train(runs, "longer", "--linear", "float", "--steps", 2)
    other = train(runs, "other", "--linear", "float", "--set", "data.val_fraction=0.3")
    early = train(runs, "early", "--linear", "ternary", "--set", "train.float_share=1")
    with pytest.raises(BitNetError, match="in its quantisation warm-up, 0% quantised at step 1"):
        Pair(early, pair.baseline).check()
    for baseline, part in ((pair.ternary, "--linear float"), (longer, "steps trained 2, expected 1")):
        with pytest.raises(BitNetError, match=part):
            Pair(pair.ternary, baseline).check()
    with pytest.raises(BitNetError, match=r"tokenizer checksum|fingerprint of the training tokens"):
        Pair(pair.ternary, other).check()
    with pytest.raises(BitNetError, match="--baseline RUN"):
        find_baseline(longer)


def test_calibration_reads_training_text_only(pair: Pair) -> None:
    from bitnet.train.data.shards import open_dataset

    dataset = open_dataset(pair.ternary / "data")
    train_ids = dataset.train.read(0, len(dataset.train)).tobytes()
    for row in pair.training_windows(5).numpy():
        assert row.tobytes() in train_ids


def test_windows_are_spread_and_whole(pair: Pair, tmp_path: Path) -> None:
    from bitnet.train.data.prepare import tokenize

    (tmp_path / "held.txt").write_text(TEXT[::-1])
    stream = tokenize((str(tmp_path / "held.txt"),), pair.tokenizer(), tmp_path)
    inputs, targets = spread_windows(stream, 32, 10)
    assert inputs.shape == targets.shape == (10, 32)
    whole = stream.read(0, len(stream))
    last = (len(stream) - 1) // 32 - 1
    assert np.array_equal(inputs[-1], whole[last * 32 : last * 32 + 32])
    assert np.array_equal(targets[0], np.where(whole[1:33] == stream.bos_id, -100, whole[1:33]))
    with pytest.raises(BitNetError, match="a window of the context"):
        spread_windows(stream, len(stream), 1)


def run_compare(pair: Pair, folder: Path, *args: object) -> int:
    (folder / "held.txt").write_text(TEXT.swapcase())
    base = [
        "compare",
        pair.ternary,
        "--baseline",
        pair.baseline,
        "--data",
        folder / "held.txt",
        "-t",
        1,
        "-q",
        "--rounds",
        1,
    ]
    return main([str(arg) for arg in [*base, *args]])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["SIGTERM", "SIGKILL"])
def test_nothing_outlives_a_comparison(number: signal.Signals, code: int, pair: Pair, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text(TEXT.swapcase())
    words = ["compare", pair.ternary, "--baseline", pair.baseline, "--data", held, "-t", 1, "-q", "--methods", "fp32"]
    command = child_process.bitnet(*words, "--rounds", 1_000_000)  # without the signal it would not end
    environment = child_process.environment(TMPDIR=tmp_path)
    with child_process.started(command, stderr=DEVNULL, env=environment) as running:
        listed = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        child_process.wait_until(lambda: running.poll() is not None or listed.read_text().split())
        assert running.poll() is None
        children = listed.read_text().split()
        time.sleep(0.5)  # so that most runs find it at work
        running.send_signal(number)
        assert running.wait(child_process.LIMIT) == code
    child_process.wait_until(lambda: not any(alive(child) for child in children))
    if number == signal.SIGTERM:
        assert not list(tmp_path.glob("bitnet-compare-*"))


def alive(process: str) -> bool:
    """Whether a process runs; a zombie that nobody has collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_last_line_of_llama_cpp_is_reported(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho noise >&2\necho 'got a bad file' >&2\nexit 3\n")
    python.chmod(0o755)
    artifact = Artifact(str(tmp_path / "model.gguf"), "llama", "llama.cpp")
    with pytest.raises(process.DiedError, match=r"code 3 \(got a bad file\)"):
        open_model(artifact, Settings(threads=1, llama=str(python)), 8, tmp_path / "logits", child_process.LIMIT)


def test_what_a_build_of_llama_cpp_lacks() -> None:
    assert "prebuilt" in builds.lacks("cyllama 1", "", ["avx2"])
    assert "without AVX-512" in builds.lacks("llama-cpp-python 1", "AVX2 = 1 | ", ["avx2", "avx512_f"])
    assert not builds.lacks("llama-cpp-python 1", "AVX2 = 1 | ", ["avx2"])
    assert not builds.lacks("llama-cpp-python 1", "AVX512 = 1 | ", ["avx512_f"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_complete_comparison(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows measured in processes of their own; the baseline against itself is exact, and JSON is what is printed."""
    methods = "fp32,gguf-q8_0,bitnet-b1.58,bitnet-1bit"
    target = tmp_path / "r.json"
    kept = tmp_path / "kept"
    code = run_compare(
        pair, tmp_path, "--methods", methods, "--max-tokens", 640, "--kl-tokens", 128, "-o", target, "--json",
        "--plot", tmp_path / "r.png", "--keep", kept,
    )  # fmt: skip
    report = json.loads(target.read_text())
    assert code == 0, report
    assert json.loads(capsys.readouterr().out) == report
    rows = {row["method"]: row for row in report["results"]}
    assert rows["bitnet-1bit"]["status"] == "missing"
    baseline = rows["fp32"]
    assert (baseline["kl"], baseline["top1"], baseline["more_than_baseline"]) == (0, 1, 0)
    measured = {name: row for name, row in rows.items() if row["status"] == "ok"}
    for name, row in measured.items():
        files = [path for path in (kept / name).iterdir() if path.is_file() and path.name.startswith("model")]
        assert row["file_bytes"] == files[0].stat().st_size
        assert row["bits_per_weight"] == row["file_bytes"] * 8 / report["parameters"]
        assert row["kl"] >= 0
        assert row["decode_tokens_per_second"] > 0
        assert row["peak_bytes"] > row["runtime_bytes"] > 0
    assert rows["bitnet-b1.58"]["kl"] > 0
    if "gguf-q8_0" in measured:  # llama.cpp runs the baseline: nearly the same distribution
        assert rows["gguf-q8_0"]["kl"] < 1e-3
    assert report["text"]["tokens"] <= 640
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "r.svg").stat().st_size > 1000


def report_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "results": rows,
        "parameters": 1_000_000,
        "models": {"steps": 1, "tokens": 2},
        "machine": {"cpu": "a CPU", "threads": 1, "cores": 2, "date": "2026-11-21"},
        "text": {"tokens": 9, "bytes": 99, "data": ["x"], "context": 3, "compared_positions": 6},
        "timing": {"prefill": 2, "decode": 1, "repeats": 3, "rounds": 2},
    }


def row_of(name: str, size: int, quality: float) -> dict[str, Any]:
    method = registry()[name]
    figures = dict.fromkeys("bits_per_byte_error more_than_baseline more_than_baseline_error kl top1".split(), 0.01)
    speeds = {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 5.0, "model_bytes": 10**6}
    speeds |= {"prefill_spread": [9.0, 12.0], "decode_spread": [5.0, 5.0]}
    row = {
        "method": name,
        "family": method.family,
        "title": method.title,
        "status": "ok",
        "note": "n",
        "library": "l 1",
    }
    return row | figures | speeds | {"file_bytes": size, "bits_per_weight": size * 8e-6, "bits_per_byte": quality}


class FakeModel:
    """Seconds a token read and written."""

    def __init__(self, reading: float, writing: float) -> None:
        self.reading, self.writing = reading, writing
        self.asked: list[tuple[int, int]] = []

    def time(self, ids: torch.Tensor, prefill: int) -> dict[str, float]:
        self.asked.append((prefill, len(ids) - prefill))
        return {"prefill": prefill * self.reading, "decode": (len(ids) - prefill) * self.writing}


@pytest.mark.parametrize(
    ("score", "reference", "needed"),
    [(False, False, 4 * (128 * 0.1 + 64 * 0.5)), (True, False, 179.2 + 20 * 32 * 0.1), (True, True, 179.2 + 23 * 3.2)],
)
def test_a_short_call_finds_a_model_too_slow_for_its_budget(
    score: bool, reference: bool, needed: float, tmp_path: Path
) -> None:
    np.save(tmp_path / "compared.npy", np.arange(3))
    job = {"text": str(tmp_path), "prefill": 128, "decode": 64, "repeats": 3, "score": score, "reference": reference}
    model, inputs = FakeModel(0.1, 0.5), torch.zeros(20, 32, dtype=torch.int64)
    assert jobs.over_budget(model, inputs, job | {"budget": needed + 0.1}) == ""  # type: ignore[arg-type]
    assert model.asked == [(16, 2)]
    reason = jobs.over_budget(model, inputs, job | {"budget": needed - 0.1})  # type: ignore[arg-type]
    assert reason.startswith("reads 10 tokens/s here: ")
    assert f" would take {needed:.0f} s of " in reason
    assert model.asked == [(16, 2)] * 3  # a model that misses the budget by the first call gets another


@pytest.mark.parametrize(
    ("script", "status", "note"),
    [
        ("time.sleep(600)", "left out", "make: not done within 1 s"),
        ("return {'too_slow': 'reads 3 tokens/s'}", "left out", "reads 3 tokens/s"),
        ("raise ValueError('got a bad file')", "failed", "got a bad file"),
        ("{}['x']", "failed", "KeyError: 'x'"),
        ("os._exit(3)", "failed", "ended with code 3 (a last line)"),
    ],
    ids=["hangs", "too-slow", "fails", "bug", "dies"],
)
def test_a_method_without_figures_is_a_row(
    script: str, status: str, note: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import os, sys, time\nclass Fake:\n    facts = {}\n    def make(self, **job):\n"
        f"        print('a last line', file=sys.stderr, flush=True)\n        {script}\n"
        "def load(settings):\n    return Fake()\n"
    )
    monkeypatch.setattr(command, "JOBS", str(fake.with_suffix("")))
    budget = 1 if "sleep" in script else child_process.LIMIT
    options = command.Options(("x",), budget=budget)
    config = Run(pair.ternary).config().model
    (tmp_path / "files").mkdir()
    comparison = command._Comparison(pair, options, SETTINGS, config, tmp_path, tmp_path / "files", lambda text: None)
    row = comparison.make(choose("bitnet-b1.58")[0])
    assert row["status"] == status
    assert note in row["note"]


def test_pictures_and_table_hold_every_method(tmp_path: Path, rng: torch.Generator) -> None:
    rows = [row_of(name, 10**6 + 10**5 * i, 1.5 + i / 50) for i, name in enumerate(registry())]
    missing = {"method": "x", "family": "gptq", "title": "X", "status": "missing", "note": "not here; pip install x"}
    report = report_of([*rows, missing])
    for path in plot_comparison(report, tmp_path / "p.png"):
        assert path.stat().st_size > 10_000
    svg = (tmp_path / "p.svg").read_text()
    assert svg.count(">bitnet-b1.58</text>") == 2  # one label per panel
    from rich.console import Console

    console = Console(width=240, record=True, file=io.StringIO())
    console.print(*comparison_tables(report))
    text = console.export_text()
    assert all(row["title"] in text for row in report["results"])
    assert text.count("10 ±15%") == text.count("5 ±0%") == len(rows)
    assert "pip install x" in text


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--methods", "int9"], "got 'int9'"),
        (["--llama", "no-such-python"], "expected a Python"),
        (["-o", "no/such/folder/x.json"], "expected a file to write"),
        (["--plot", "x.gif"], "ends in .png or .svg"),
    ],
)
def test_bad_options(
    args: list[str], part: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_compare(pair, tmp_path, *args) == 2
    assert part in capsys.readouterr().err
