"""`bitnet sweep`: which runs a file asks for, that they are those of `bitnet train`, and going on where it stopped."""

import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from bitnet.benchmarks.sweep import run as sweep
from bitnet.benchmarks.sweep.plot import plot_curves, plot_scaling, plot_sweep
from bitnet.benchmarks.sweep.spec import read_held_out, read_spec
from bitnet.benchmarks.sweep.summary import Result, mean_and_error, summarize, summarize_again
from bitnet.benchmarks.sweep.table import sweep_cells, sweep_table, tuned_gaps
from bitnet.cli import main
from bitnet.config import preset
from bitnet.errors import BitNetError
from bitnet.train import pretrain as loop
from bitnet.train.command import resolve
from bitnet.train.runs.run import Run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SHAPE = """
model.hidden_size = 32
model.intermediate_size = 44
model.num_hidden_layers = 1
model.num_attention_heads = 2
model.num_key_value_heads = 1
model.max_position_embeddings = 16
train.steps = 4
train.batch_size = 2
train.eval_every = 0
train.dtype = "fp32"
tokenizer.kind = "char"
"""


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.train.pretrain.plot_run", lambda *args: [])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "toy.txt"
    path.write_text("".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(700)))
    return path


def written(text: Path, content: str, base: str = "") -> Path:
    file = text.parent / "ladder.toml"
    top, _, rest = content.partition("\n[")
    file.write_text(f"{top}\n[base]\ndata.paths = ['{text}']\n{base}{SHAPE}" + (f"\n[{rest}" if rest else ""))
    return file


def test_a_grid_of_listed_runs(text: Path) -> None:
    content = """seeds = [3, 5]
linears = ["ternary", "float"]
[grid]
train.lr = [0.001, 0.002]
train.momentum = [0.8, 0.9]
[[runs]]
[[runs]]
name = "zero init"
train.zero_init = true"""
    plans = read_spec(written(text, content))
    assert len(plans) == 2 * 2 * 2 * 2 * 2
    assert len({plan.folder for plan in plans}) == len(plans)
    combinations = {
        (p.linear, p.seed, *(p.values["train"].get(key) for key in ("lr", "momentum", "zero_init"))) for p in plans
    }
    assert len(combinations) == len(plans)
    for plan in plans:
        assert plan.values["model"]["linear"] == plan.linear
        assert plan.values["train"]["steps"] == 4
        assert f"lr={plan.values['train']['lr']:g}" in plan.point


def test_a_listed_run_with_linears_of_its_own(text: Path) -> None:
    content = """seeds = [3, 5]
linears = ["ternary", "float"]
[[runs]]
[[runs]]
name = "float first"
linears = ["ternary"]
train.float_share = 0.2"""
    plans = read_spec(written(text, content))
    assert [(plan.point, plan.linear, plan.seed) for plan in plans] == [
        ("base", "ternary", 3),
        ("base", "float", 3),
        ("base", "ternary", 5),
        ("base", "float", 5),
        ("float first", "ternary", 3),
        ("float first", "ternary", 5),
    ]
    assert "linears" not in plans[-1].values


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("seeds = []", "seeds"),
        ("seeds = [1.5]", "seeds"),
        ("linears = ['cubic']", "linears"),
        ("[[runs]]\nlinears = []", "linears"),
        ("[[runs]]\nlinears = 'float'", "linears"),
        ("sedes = [1]", "sedes"),
        ("[grid]\ntrain.lr = 0.1", "expected a list"),
        ("[[runs]]\nname='x'\n[[runs]]\nname='x'", "one name"),
        ("seeds = [", "TOML"),
        ("linears = ['cubic']\n[[runs]]\nlinears = ['float']", "linears"),  # though every run has its own
        ("preset = 'nanoo'", "preset 'nanoo', expected one of nano"),
        ("preset = ['nano']", "preset .'nano'., expected one of nano"),
        ("[[runs]]\n[[runs]]\npreset = 'nanoo'", r"\[\[runs\]\] 2: got preset 'nanoo'"),
        ("[[runs]]\nlinear = ['float']", "got linear = .'float'., expected .* or name, linears, preset"),
        ("[[runs]]\nname = 3", "name 3, expected text"),
        ("[[runs]]\nname = ''", "name '', expected text"),
        ("[[runs]]\n[runs.train]\nlr = 1\n[grid]\ntrain.lr = [1]", r"train.lr in \[grid\] and in \[\[runs\]\]"),
        ("[runs]\ntrain.lr = 0.1", "one or more tables"),
        ("runs = []", "one or more tables"),
        ("runs = [3]", "one or more tables"),
        ("grid = 3", r"\[grid\]: got 3, expected a table"),
        ("[grid]\nlr = [0.1]", r"\[grid\]: got lr = .0.1., expected settings with their section"),
        ("base = 3", r"\[base\]: got 3, expected a table"),
        ("[base]\nsteps = 3", r"\[base\]: got steps = 3, expected settings with their section"),
        ("[grid]\nmodel.linear = ['float']", "got model.linear, expected none; linears ="),
        ("[grid]\ntrain.seed = [1, 2]", "got train.seed, expected none; seeds ="),
        ("[base]\nmodel.linear = 'float'", "got model.linear, expected none; linears ="),
        ("[base]\ntrain.seed = 1", "got train.seed, expected none; seeds ="),
        ("[[runs]]\nmodel.linear = 'float'", "got model.linear, expected none; linears ="),
        ("[[runs]]\ntrain.seed = 1", "got train.seed, expected none; seeds ="),
        ("test = ['-']", "every run reads the text again"),
        ("test = 'x.txt'", "a list of paths"),
        ("test_tokens = 5", "a list of paths"),
        ("test = ['x.txt']\ntest_tokens = -1", "a list of paths"),
    ],
)
def test_mistakes_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(content)

    def read(path: Path) -> None:
        read_spec(path)
        read_held_out(path)

    with pytest.raises(BitNetError, match=says) as raised:
        read(tmp_path / "x.toml")
    assert "x.toml" in str(raised.value)


def test_listed_runs_with_presets_of_their_own(text: Path) -> None:
    content = """preset = "nano"
[base]
train.steps = 4
[[runs]]
[[runs]]
preset = "mini"
[[runs]]
preset = "small"
name = "the large one"
train.lr = 0.001"""
    file = text.parent / "ladder.toml"
    file.write_text(content)
    plans = read_spec(file)
    assert [(plan.point, plan.preset) for plan in plans] == [
        ("base", "nano"),
        ("preset=mini", "mini"),
        ("the large one", "small"),
    ]
    for plan in plans:
        assert plan.values.keys() == {"train", "model"}
        found = resolve(plan.preset, None, plan.values, [], Run(text.parent / "none")).model
        assert plan.preset is not None
        assert found == preset(plan.preset)


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "specs").glob("*.toml")), ids=lambda file: file.stem)
def test_the_ladders_of_this_project(file: Path) -> None:
    read_held_out(file)
    for plan in read_spec(file):
        resolve(plan.preset, None, plan.values, [], Run(file.parent / "none"))


def test_mean_and_error() -> None:
    values = [random.random() for _ in range(5)]
    found = mean_and_error(values)
    assert found is not None
    assert found["mean"] == pytest.approx(sum(values) / 5)
    assert found["error"] == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert mean_and_error([2.0]) == {"mean": 2.0, "error": None}
    assert mean_and_error([]) is None


CONTENT = """seeds = [1, 2]
linears = ["ternary", "float"]
[grid]
train.lr = [0.001, 0.01]"""


def test_a_sweep_goes_on_and_tells(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off in its fourth run, started again: eight runs, each trained once, equal to what `bitnet train` gives."""
    file, out, calls = written(text, CONTENT), text.parent / "out", 0
    original = loop.Trainer._training_step

    def counted(trainer: loop.Trainer) -> dict[str, Any] | None:
        nonlocal calls
        calls += 1
        if calls == 4 * 3 + 2:
            raise KeyboardInterrupt
        return original(trainer)

    monkeypatch.setattr(loop.Trainer, "_training_step", counted)
    args = ["sweep", str(file), "--out", str(out), "--json", "-q"]
    assert main(args) == 130
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert calls == 8 * 4 + 2  # the run that was cut off had no save yet: one step again, and the one that was cut
    assert json.loads((out / "sweep.json").read_text()) == report
    assert all((out / f"{name}.png").exists() for name in ("sweep", "curves"))
    assert len(report["runs"]) == 8
    for run in report["runs"]:  # of the model that was trained: its characters, not the vocabulary asked for
        assert len(report["curves"][run["run"]]) == 4  # as many as steps
        model, _ = Run(out / run["run"]).load()
        assert run["parameters"] == sum(weight.numel() for weight in model.parameters())
    by_key = {(r["point"], r["linear"], r["seed"]): r["loss"] for r in report["runs"]}
    for point in report["points"]:
        losses = [by_key[point["point"], point["linear"], seed] for seed in (1, 2)]
        assert point["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        gaps = [by_key[point["point"], "ternary", s] - by_key[point["point"], "float", s] for s in (1, 2)]
        assert (point["gap"] is None) == (point["linear"] == "float")
        assert point["gap"] is None or point["gap"]["mean"] == pytest.approx(sum(gaps) / 2)
    means = {(p["point"], p["linear"]): p["loss"]["mean"] for p in report["points"]}
    (size,) = report["sizes"]
    assert size["tried"] == {"ternary": 2, "float": 2}
    for linear, best in size["best"].items():
        assert means[best, linear] == min(mean for (_, kind), mean in means.items() if kind == linear)
    ours, theirs = (size["best"][linear] for linear in ("ternary", "float"))
    gaps = [by_key[ours, "ternary", s] - by_key[theirs, "float", s] for s in (1, 2)]
    assert size["tuned_gaps"].keys() == {"ternary"}
    assert size["tuned_gaps"]["ternary"]["pairs"] == 2
    assert size["tuned_gaps"]["ternary"]["gap"]["mean"] == pytest.approx(statistics.fmean(gaps))
    assert size["tuned_gaps"]["ternary"]["gap"]["error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)

    plan = random.choice(read_spec(file))
    settings = [f"{s}.{k}={v}" for s, c in plan.values.items() for k, v in c.items() if s in ("model", "train")]
    alone = text.parent / "alone"
    sets = [part for s in settings for part in ("--set", s)]
    assert main(["train", "--data", str(text), "--tokenizer", "char", "--out", str(alone), "-q", *sets]) == 0
    assert [r["loss"] for r in Run(alone).metrics() if "loss" in r] == [
        r["loss"] for r in Run(out / plan.folder).metrics() if "loss" in r
    ]
    before = calls
    assert main(args) == 0  # nothing is left to do
    assert calls == before


def test_other_settings_under_the_same_name_are_refused(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = text.parent / "out"
    assert main(["sweep", str(written(text, "seeds = [1]")), "--out", str(out), "-q"]) == 0
    changed = written(text, "seeds = [1]", "train.clip = 0.5\n")
    assert main(["sweep", str(changed), "--out", str(out), "-q"]) == 2
    assert "train.clip" in capsys.readouterr().err
    longer = written(text, "seeds = [2, 1]")
    longer.write_text(longer.read_text().replace("train.steps = 4", "train.steps = 6"))
    assert main(["sweep", str(longer), "--out", str(out), "-q"]) == 2
    assert "train.steps = 4, got 6" in capsys.readouterr().err
    assert len(list(out.glob("*s2"))) == 0  # refused before anything is trained
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", str(written(text, "seeds = [1]")), "--out", str(out), "-q"]) == 2
    assert "expected one" in capsys.readouterr().err


def test_a_run_that_diverges_is_listed_and_the_rest_is_trained(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sweep.run_training

    def diverging(preset: Any, file: Any, values: Any, *rest: Any, **options: Any) -> Any:
        done = original(preset, file, values, *rest, **options)
        if values["train"]["lr"] == 0.01:
            raise BitNetError("training diverged: got 5 steps in a row without a finite gradient")
        return done

    monkeypatch.setattr(sweep, "run_training", diverging)
    file, out = written(text, CONTENT.replace("[1, 2]", "[1]")), text.parent / "out"
    assert main(["sweep", str(file), "--out", str(out), "-q"]) == 0
    report = json.loads((out / "sweep.json").read_text())
    assert [r["loss"] is None for r in report["runs"]] == ["lr=0.01" in r["point"] for r in report["runs"]]
    assert {p["diverged"] for p in report["points"] if "lr=0.01" in p["point"]} == {1}
    (size,) = report["sizes"]
    assert size["best"] == {"ternary": "lr=0.001", "float": "lr=0.001"}
    assert size["tried"] == {"ternary": 2, "float": 2}

    monkeypatch.setattr(sweep, "run_training", original)
    again = next(r for r in report["runs"] if r["loss"] is None)
    assert main(["sweep", str(file), "--out", str(out), "-q"]) == 0
    assert json.loads((out / "sweep.json").read_text())["runs"] == report["runs"]
    shutil.rmtree(out / again["run"])  # the way to try it again
    assert main(["sweep", str(file), "--out", str(out), "-q"]) == 0
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    assert sum(r["loss"] is None for r in runs) == 1
    assert next(r for r in runs if r["run"] == again["run"])["loss"] is not None


def test_the_plan_is_listed(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(text, CONTENT)
    assert main(["sweep", str(file), "--out", str(text.parent / "out"), "--plan"]) == 0
    assert capsys.readouterr().out.split() == [plan.folder for plan in read_spec(file)]
    assert not (text.parent / "out").exists()


def test_finished_runs_score_the_test_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ternary run as its packed file scores the same windows; a changed text is scored anew, nothing else is."""
    unseen, out = tmp_path / "unseen.txt", tmp_path / "out"
    unseen.write_text("".join(random.choice(["fade ", "bag ", "cabbage\n", "hedge "]) for _ in range(200)))
    content = "seeds = [3]\nlinears = ['ternary', 'float']\ntest = ['{}']\n[[runs]]\n[[runs]]\nmodel.hidden_size = 64"
    file = written(text, content.format(unseen))
    args = ["sweep", str(file), "--out", str(out), "--json", "-q"]
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert (out / "scaling.png").exists()  # two sizes
    assert len({run["parameters"] for run in report["runs"]}) == 2
    for run in report["runs"]:
        if run["linear"] == "ternary":
            assert main(["pack", str(out / run["run"]), "-o", str(tmp_path / "m.safetensors")]) == 0
            capsys.readouterr()
            count = len(Run(out / run["run"]).tokenizer().encode(unseen.read_text()))
            whole = str((count - 1) // 16 * 16)  # nothing comes before the first token to predict it from
            words = ["eval", "-m", str(tmp_path / "m.safetensors"), "--data", str(unseen), "--tokens", whole, "--json"]
            assert main(words) == 0
            found = json.loads(capsys.readouterr().out)
            assert run["test_loss"] == pytest.approx(found["loss"], rel=1e-5)
            assert run["test_bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-5)
    for point in report["points"]:
        if point["linear"] == "ternary":
            ours, twin = (
                next(r for r in report["runs"] if (r["point"], r["linear"]) == (point["point"], linear))
                for linear in ("ternary", "float")
            )
            assert point["test_gap"]["mean"] == pytest.approx(ours["test_loss"] - twin["test_loss"])
    folder = out / report["runs"][0]["run"]
    before = (folder / "test.json").stat().st_mtime_ns
    unseen.touch()  # the same text
    assert main(args) == 0
    assert (folder / "test.json").stat().st_mtime_ns == before
    was = unseen.read_text()
    unseen.write_text(was[len(was) // 2 :] + was[: len(was) // 2])  # as long, and another
    capsys.readouterr()
    assert main(args) == 0
    for run, old in zip(json.loads(capsys.readouterr().out)["runs"], report["runs"], strict=True):
        assert run["test_loss"] != old["test_loss"]
        assert run["loss"] == old["loss"]
    file.write_text(file.read_text().replace("test = ", "test_tokens = 64\ntest = "))
    assert main(args) == 0
    assert json.loads((folder / "test.json").read_text())["tokens"] == 64
    file.write_text(file.read_text().replace(str(unseen), str(tmp_path / "nowhere.txt")))
    assert main(["sweep", str(file), "--out", str(tmp_path / "new"), "-q"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()  # named before anything is trained


def result(point: str, linear: str, seed: int, loss: float | None, size: int = 1000, **more: Any) -> Result:
    more = {"weights": size, "parameters": size, **more}
    return Result(point, linear, seed, f"{point}-{linear}-s{seed}", steps=4, tokens=512, loss=loss, **more)


def test_each_size_has_its_own_best_points_and_gaps() -> None:
    """Two sizes; gains of norms make none; the larger plain models would beat all; seeds that only one kind has."""
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
def test_points_without_a_twin_in_tables_and_pictures(plain: list[Result], loss: float | None, tmp_path: Path) -> None:
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
