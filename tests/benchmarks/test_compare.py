"""`bitnet compare`: its formulas against fp64 loops, real files, honest refusals, and one whole run on a tiny pair."""

import importlib.util
import io
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import child_process
import numpy as np
import pytest
import torch

from bitnet.benchmarks.children import builds, llama, process
from bitnet.benchmarks.compare import command, gguf_methods, jobs, measure
from bitnet.benchmarks.compare.artifact import Artifact, pack_nibbles, read_model, unpack_nibbles
from bitnet.benchmarks.compare.method import Settings
from bitnet.benchmarks.compare.models import open_model
from bitnet.benchmarks.compare.pair import Pair, find_baseline
from bitnet.benchmarks.compare.plot import pareto, plot_comparison
from bitnet.benchmarks.compare.registry import choose, registry
from bitnet.benchmarks.compare.table import comparison_tables
from bitnet.benchmarks.compare.torchao_methods import activation_ranges
from bitnet.cli import main
from bitnet.errors import BitNetError
from bitnet.train.data.windows import spread_windows
from bitnet.train.runs.run import Run

TEXT = "".join(f"Line {i}: the quick brown fox number {i * i} jumps over the lazy dog.\n" for i in range(400))
SETTINGS = Settings(threads=1, qat_steps=1, calibration=2)
NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def train(folder: Path, name: str, *args: object) -> Path:
    """One step of a model that llama.cpp takes: sizes are multiples of 256."""
    if not (folder / "toy.txt").exists():
        (folder / "toy.txt").write_text(TEXT)
    sets = "hidden_size=256 intermediate_size=256 num_hidden_layers=1 num_attention_heads=4 vocab_size=320 "
    sets += "num_key_value_heads=2 max_position_embeddings=32 hidden_act=silu qk_norm=false"
    settings = [part for one in sets.split() for part in ("--set", f"model.{one}")]
    base = ["train", "-q", "--data", folder / "toy.txt", "--batch-size", 2, *settings, "--out", folder / name]
    assert main([str(arg) for arg in [*base, "--steps", 1, *args]]) == 0
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    for linear in ("ternary", "float"):
        train(folder, f"toy-{linear}", "--linear", linear)
    yield folder
    patch.undo()


@pytest.fixture
def pair(runs: Path) -> Pair:
    return Pair(runs / "toy-ternary", runs / "toy-float")


# ---- formulas


def test_formulas_against_loops(rng: torch.Generator) -> None:
    W, T, V = 5, 7, 11
    logits, reference = torch.randn(2, W, T, V, generator=rng) * 3
    targets = torch.randint(0, V, (W, T), generator=rng)
    targets[1, 3] = targets[4, 0] = -100
    nats, kl, same = np.zeros(W), np.zeros((W, T)), np.zeros((W, T))
    for w in range(W):
        for t in range(T):
            q = [float(x) for x in logits[w, t].double()]
            p = [float(x) for x in reference[w, t].double()]
            log_q = [x - math.log(math.fsum(math.exp(y) for y in q)) for x in q]
            log_p = [x - math.log(math.fsum(math.exp(y) for y in p)) for x in p]
            kl[w, t] = math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
            same[w, t] = p.index(max(p)) == q.index(max(q))
            if targets[w, t] != -100:
                nats[w] -= log_q[int(targets[w, t])]
    # fp32 cross entropy: a few roundings of values below 20, seven of them summed.
    assert np.allclose(measure.window_nats(logits, targets).numpy(), nats, atol=7 * 20 * 2**-22)
    assert np.allclose(measure.divergence(reference, logits).numpy(), kl, atol=1e-12)
    assert np.array_equal(measure.agreement(reference, logits).numpy(), same.astype(bool))


def test_figures_against_their_definition(seed: int) -> None:
    """Standard errors of ratios over stretches (Cochran), and of the difference to the twin, which is paired."""
    rng = np.random.default_rng(seed)
    W, T = 70, 16
    tokens, sizes = rng.integers(10, T + 1, W), rng.integers(30, 60, W)
    twin = measure.Scores(rng.uniform(20, 60, W), np.zeros(10), np.full(10, float(T)))
    extra = rng.uniform(0, 1, W)
    row = measure.Scores(twin.nats + extra, rng.uniform(0, 3, 10), rng.integers(0, T + 1, 10).astype(float))
    got = measure.figures(row, twin, tokens, sizes, T)

    def expected(total: np.ndarray, weight: np.ndarray, groups: int) -> tuple[float, float]:
        parts = np.array_split(np.arange(len(total)), groups)
        y, x = (np.array([values[part].sum() for part in parts]) for values in (total, weight))
        share = y.sum() / x.sum()
        return share, math.sqrt(groups / (groups - 1) * ((y - share * x) ** 2).sum()) / x.sum()

    for key, total, weight, groups, unit in (
        ("bits_per_byte", row.nats, sizes, 32, math.log(2)),
        ("more_than_baseline", extra, sizes, 32, math.log(2)),
        ("kl", row.kl, np.full(10, T), 10, 1),
        ("top1", row.top1, np.full(10, T), 10, 1),
    ):
        value, error = expected(total, weight, groups)
        assert got[key] == pytest.approx(value / unit, rel=1e-9)
        assert got[f"{key}_error"] == pytest.approx(error / unit, rel=1e-6)
    assert got["more_than_baseline_error"] < got["bits_per_byte_error"]


def test_nibbles_come_back(rng: torch.Generator) -> None:
    values = torch.randint(-8, 8, (63, 130), generator=rng, dtype=torch.int8)
    packed = pack_nibbles(values)
    assert packed.shape == (63, 65)
    assert torch.equal(unpack_nibbles(packed), values)


@pytest.mark.parametrize("lower", [True, False])
def test_front_holds_what_nothing_beats(lower: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 12, (40, 2))]
    better = (lambda a, b: a <= b) if lower else (lambda a, b: a >= b)
    kept = {
        p for p in points if not any(q != p and q[0] <= p[0] and better(q[1], p[1]) for q in points)
    }  # nothing else is as small and as good
    assert set(pareto(points, lower=lower)) == kept


# ---- methods


def test_names_and_families() -> None:
    assert [method.name for method in choose("fp32,bf16")] == ["fp32", "bf16"]
    assert {method.family for method in choose("gguf")} == {"gguf"}
    assert choose(None) == list(registry().values())
    with pytest.raises(BitNetError, match="expected some of fp32"):
        choose("fp32,none")


@NEEDS_TORCHAO
@pytest.mark.filterwarnings("ignore")  # torchao's own, at import
@pytest.mark.parametrize(
    ("name", "bits"), [("int8-absmax", 8), ("int8-zeropoint", 8), ("ptq-static", 8), ("ptq-int4", 4)]
)
def test_files_hold_what_was_quantised(name: str, bits: int, pair: Pair, tmp_path: Path) -> None:
    """The file has the bits it claims, and gives a model whose weights are the twin's up to half a step."""
    artifact = registry()[name].make(pair, tmp_path, SETTINGS)
    model, autocast = read_model(Path(artifact.path))
    twin = pair.baseline_model()
    assert autocast is None
    linears = 0
    for layer, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear):
            got, weight = model.get_submodule(layer).weight.dequantize().float(), module.weight.detach()
            linears += weight.numel()
            span = weight.amax(1, keepdim=True).clamp(min=0) - weight.amin(1, keepdim=True).clamp(max=0)
            step = torch.maximum(span, 2 * weight.abs().amax(1, keepdim=True)) / (2**bits - 2)
            assert ((got - weight).abs() <= 0.51 * step + 1e-6).all(), layer
    rest = sum(p.numel() for p in twin.parameters()) - linears
    least = linears * bits / 8 + 2 * twin.model.embed_tokens.weight.numel()
    ids = pair.training_windows(2)[:, :-1]
    with torch.no_grad():
        divergence = measure.divergence(twin(ids), model(ids))
    assert 0 < float(divergence.mean()) < 0.1  # it runs, and nearly as the twin does
    assert least < artifact.bytes < least + 4 * rest + linears // 4 + 40_000  # scales, norms, tokenizer, header


@pytest.mark.parametrize(("name", "size"), [("fp32", 4), ("bf16", 2)])
def test_float_files(name: str, size: int, pair: Pair, tmp_path: Path) -> None:
    artifact = registry()[name].make(pair, tmp_path, SETTINGS)
    twin = pair.baseline_model()
    model, _ = read_model(Path(artifact.path))
    tolerance = 0 if size == 4 else 2.0**-8
    for key, value in twin.state_dict().items():
        assert torch.allclose(model.state_dict()[key].float(), value, rtol=tolerance, atol=0), key
    count = sum(p.numel() for p in twin.parameters())
    assert count * size < artifact.bytes < count * size + 40_000


def test_activation_ranges(pair: Pair) -> None:
    twin, ids = pair.baseline_model(), pair.training_windows(9)[:, :-1]
    seen: dict[str, list[float]] = {}
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear):
            seen[name] = []
            module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(float(args[0].abs().max())))
    ranges = activation_ranges(twin, ids)
    assert {name: float(value) for name, value in ranges.items()} == {
        name: max(values) for name, values in seen.items()
    }


def test_missing_library_says_how_to_get_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("int8-absmax", "compare"), ("gptq-int4", "compare-gptq"), ("gguf-q4_0", "compare")):
        reason = registry()[name].why_not(pair, SETTINGS)
        assert reason is not None
        assert f"pip install 'bitnet-ternary[{extra}]'" in reason
    assert "--binary RUN" in str(registry()["bitnet-1bit"].why_not(pair, SETTINGS))


def test_shapes_llama_cpp_cannot_hold(pair: Pair) -> None:
    config = pair.baseline_model().config
    assert gguf_methods.why_not_shape(config, "f16", 256) is None
    assert "QK norm" in str(gguf_methods.why_not_shape(config.replace(qk_norm=True), "f16", 1))
    assert "ReLU^2" in str(gguf_methods.why_not_shape(config.replace(hidden_act="relu2"), "f16", 1))
    assert "intermediate_size 320 is not a multiple of 256" in str(
        gguf_methods.why_not_shape(config.replace(intermediate_size=320), "f16", 256)
    )


# ---- pairs


def test_scores_of_a_shorter_batch_replace_those_before(tmp_path: Path, rng: torch.Generator) -> None:
    class Llama:
        def clear(self) -> None:
            self.cleared = True

        def read(self, ids: list[int], start: int, every: bool) -> np.ndarray:
            assert (self.cleared, start, every) == (True, 0, True)
            self.cleared = False
            return np.array(ids, dtype=np.float32)[:, None] * np.arange(7, dtype=np.float32)

    fake, path = Llama(), tmp_path / "logits"
    for count in (3, 1, 2):
        rows = torch.randint(100, (count, 5), generator=rng)
        assert llama.write_logits(fake, rows.tolist(), str(path)) == {"vocab": 7}
        got = np.fromfile(path, dtype=np.float32).reshape(count, 5, 7)
        assert np.array_equal(got, rows.numpy()[:, :, None].astype(np.float32) * np.arange(7, dtype=np.float32))


def test_twins_that_are_none(runs: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])
    assert pair.check()["steps"] == 1
    assert find_baseline(pair.ternary) == pair.baseline.resolve()
    longer = train(runs, "longer", "--linear", "float", "--steps", 2)
    other = train(runs, "other", "--linear", "float", "--set", "data.val_fraction=0.3")
    early = train(runs, "early", "--linear", "ternary", "--set", "train.float_share=1")
    with pytest.raises(BitNetError, match="in its quantisation warm-up, 0% quantised at step 1"):
        Pair(early, pair.baseline).check()
    for twin, part in ((pair.ternary, "--linear float"), (longer, "steps trained 2, expected 1")):
        with pytest.raises(BitNetError, match=part):
            Pair(pair.ternary, twin).check()
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


# ---- the whole


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


def test_the_last_words_of_llama_cpp_are_kept(tmp_path: Path) -> None:
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
def test_a_whole_comparison(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows measured in processes of their own; the twin against itself is exact, and JSON is what is printed."""
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
    twin = rows["fp32"]
    assert (twin["kl"], twin["top1"], twin["more_than_baseline"]) == (0, 1, 0)
    measured = {name: row for name, row in rows.items() if row["status"] == "ok"}
    for name, row in measured.items():
        files = [path for path in (kept / name).iterdir() if path.is_file() and path.name.startswith("model")]
        assert row["file_bytes"] == files[0].stat().st_size
        assert row["bits_per_weight"] == row["file_bytes"] * 8 / report["parameters"]
        assert row["kl"] >= 0
        assert row["decode_tokens_per_second"] > 0
        assert row["peak_bytes"] > row["runtime_bytes"] > 0
    assert rows["bitnet-b1.58"]["kl"] > 0
    if "gguf-q8_0" in measured:  # llama.cpp runs the twin: nearly the same distribution
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
def test_a_model_too_slow_for_its_budget_is_found_out_by_a_short_call(
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
    assert svg.count(">bitnet-b1.58</text>") == 2  # one label a panel
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
